"""What a configuration would do on a node: throughput, lag and idle shares, predicted on a virtual clock.

    prediction = simulate(config, node, episodes, updates=100)

Generator, sample buffer, trainer, slots and ledger are the real ones. What takes time is not: episodes last as long as
their sample says, an update as long as the node says.
"""

from ale.simulation.episodes import Episode, Lognormal, Recorded, Sampler
from ale.simulation.node import Node
from ale.simulation.simulate import Prediction, simulate

__all__ = ["Episode", "Lognormal", "Node", "Prediction", "Recorded", "Sampler", "simulate"]
