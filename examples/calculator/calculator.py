"""An environment with a tool: sums are to be found with a calculator, which must be called in the right form."""

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
"""The tool's schema, which the chat template writes before the first message."""


class Calculator:
    """One sum: each call of the tool is answered with its result, and a text without a call is the student's answer."""

    tools = (ADD,)

    async def reset(self, record, episode):
        """Begins with the record's sum."""
        self.answer = record["answer"]
        return [{"role": "user", "content": record["prompt"]}]

    async def step(self, message):
        """Answers a call, or judges an answer: 1 where it is right."""
        calls = message.get("tool_calls", ())
        # What the parser could not read has stayed text: the student is told, and may try again.
        if not calls and "tool_call" not in message["content"]:
            return [], True, float(message["content"].strip() == self.answer)
        results = [add(call["function"]) for call in calls] or ["error"]
        return [{"role": "tool", "content": result} for result in results], False, None


def add(function):
    """What the tool answers to a call: the sum, or `error` where the name or the arguments are others."""
    given = function["arguments"]
    if function["name"] != "add" or given.keys() != {"a", "b"} or not all(type(one) is int for one in given.values()):
        return "error"
    return str(given["a"] + given["b"])
