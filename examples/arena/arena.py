"""A game of TextArena for one player as an environment. Needs `pip install textarena` (tried with 0.7.4).

The record has the seed of the game: all samples of a prompt play the same one.
"""

import random
from contextlib import contextmanager

import textarena


class Arena:
    """One game, by its name in TextArena's registry, such as GuessTheNumber-v0. The reward is the game's."""

    def __init__(self, game: str):
        self.game = textarena.make(f"{game}-raw")  # the others repeat in each turn all that was said before
        self.drawn = random.getstate()

    async def reset(self, record, episode):
        """Begins the game of the record's seed."""
        with self.own_draws():
            self.game.reset(num_players=1, seed=record["seed"])
        return self.told()

    async def step(self, message):
        """Makes the student's move."""
        with self.own_draws():
            done, _ = self.game.step(message["content"])
        if done:
            return [], True, float(self.game.close()[0][0])
        return self.told(), False, None

    def told(self):
        """What the game has said since the last move."""
        _, observations = self.game.get_observation()
        return "\n".join(text for sender, text, _ in observations if sender == textarena.GAME_ID)

    @contextmanager
    def own_draws(self):
        """Games draw from the module `random`, and one process plays many: each goes on where it stopped."""
        others = random.getstate()
        random.setstate(self.drawn)
        try:
            yield
        finally:
            self.drawn = random.getstate()
            random.setstate(others)
