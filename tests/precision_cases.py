"""What the tests of the codec's numbers share: noise that is the same in every run, and the error that is left of it."""

import torch

ALL = slice(None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def relative(found, x):
    """Of each row of [T, R, D], the error as a share of its energy."""
    return ((found.float() - x).square().sum((0, 2)) / x.square().sum((0, 2))).tolist()


def clustered(tokens, rows=2, dim=16, clusters=4, seed=0, spread=0.05):
    """Tokens around a few far places, and the places [R, C, D]."""
    places = 10 * noise(rows, clusters, dim, seed=seed)
    chosen = torch.arange(tokens) % clusters
    return places[:, chosen].transpose(0, 1) + spread * noise(tokens, rows, dim, seed=seed + 1), places
