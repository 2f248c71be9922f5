"""An environment with three tools, for a language model whose chat template knows of none: the system message describes them."""

import json
import re

PRICES = {
    "lamp": 24, "chair": 45, "desk": 130, "shelf": 60, "rug": 75, "mirror": 38, "clock": 17, "sofa": 420, "table": 210, "bench": 85,
    "stool": 32, "basket": 14, "blanket": 28, "carpet": 160, "cushion": 12, "fan": 54, "heater": 95, "kettle": 26, "ladder": 67,
    "pillow": 19, "toaster": 41, "vase": 29, "bed": 310, "wardrobe": 380,
}  # fmt: skip


def schema(name, description, **parameters):
    """One tool as JSON schema. parameters: name -> type."""
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "add": (lambda a, b: a + b, schema("add", "Adds two numbers.", a="number", b="number")),
    "multiply": (lambda a, b: a * b, schema("multiply", "Multiplies two numbers.", a="number", b="number")),
    "price": (lambda item: PRICES[item], schema("price", "The price of an item in the shop.", item="string")),
}
USES = [f"{name}({', '.join(its['function']['parameters']['required'])})" for name, (_, its) in TOOLS.items()]
SYSTEM = f"You answer questions with tools: {', '.join(USES)}."


def called(name, **arguments):
    """A call of a tool, as the student is to write it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def shown(question, call, result):
    """An example: a question, a call, its result and the answer."""
    texts = {"user": question, "assistant": call, "tool": result}
    return [{"role": role, "content": text} for role, text in texts.items()] + [
        {"role": "assistant", "content": f"The answer is {result}."}
    ]


EXAMPLES = [
    *shown("How much does a lamp cost?", called("price", item="lamp"), "24"),
    *shown("What is 12 times 31?", called("multiply", a=12, b=31), "372"),
    *shown("What is the price of a vase?", called("price", item="vase"), "29"),
    *shown("How much is 45 + 18?", called("add", a=45, b=18), "63"),
    *shown("I want to buy a bed. What do I have to pay?", called("price", item="bed"), "310"),
]
"""A model of this size calls no tool that it has only read a description of."""


class Shop:
    """One question: calls are answered with their results, and a text without a call is the answer."""

    async def reset(self, record, episode):
        """Begins with the record's question."""
        self.answer, self.used = record["answer"], False
        return [{"role": "system", "content": SYSTEM}, *EXAMPLES, {"role": "user", "content": record["prompt"]}]

    async def step(self, message):
        """Answers calls; judges an answer: 1 where a tool has worked and its last number is right."""
        calls = message.get("tool_calls", ())
        if not calls and "tool_call" in message["content"]:
            return [{"role": "tool", "content": 'error: not a call {"name": ..., "arguments": {...}}'}], False, None
        if not calls:
            numbers = re.findall(r"\d+", message["content"].replace(",", ""))
            return [], True, float(self.used and numbers[-1:] == [self.answer])
        return [{"role": "tool", "content": self.call(call["function"])} for call in calls], False, None

    def call(self, function):
        """The result of a call as text, or what is wrong with it."""
        if function["name"] not in TOOLS:
            return f"error: no tool {function['name']}; there are {', '.join(TOOLS)}"
        tool, its = TOOLS[function["name"]]
        names = its["function"]["parameters"]["required"]
        if {*function["arguments"]} != {*names}:
            return f"error: the arguments are {' and '.join(names)}"
        try:
            result = tool(**function["arguments"])
        except (TypeError, KeyError):
            return "error: no such value"
        self.used = True
        return str(result)
