"""A parser of arguments whose errors name what was perhaps meant."""

import argparse
import difflib
import re
from typing import NoReturn


class HelpfulParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors suggest the nearest command, option or choice."""

    def error(self, message: str) -> NoReturn:
        """Prints usage, the message and a suggestion, and ends with status 2."""
        super().error(message + self._meant(message))

    def _meant(self, message: str) -> str:
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            wrong, known = [found[1]], re.findall(r"[\w.-]+", found[2])
        elif message.startswith("unrecognized arguments: "):
            wrong = [word.partition("=")[0] for word in message.split()[2:] if word.startswith("-")]
            known = sorted(set(re.findall(r"--[\w-]+", self.format_help())))
        else:
            return ""
        nearest = [near for word in wrong for near in difflib.get_close_matches(word, known, n=1)]
        return f"; did you mean {' '.join(nearest)}?" if nearest else ""
