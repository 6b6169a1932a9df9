"""Partitioners: one data set dealt out to clients (`atoll.partition.dirichlet((x, y), clients=100, alpha=0.3)`)."""

from atoll.data.partition import by_group, by_label, dirichlet, iid, quantity, shards

__all__ = ["by_group", "by_label", "dirichlet", "iid", "quantity", "shards"]
