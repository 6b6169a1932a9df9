"""Clients and their examples: the packed dataset, its readers, partitioners, tables and the catalog."""

from atoll.data.dataset import ClientData, FederatedDataset, Split

__all__ = ["ClientData", "FederatedDataset", "Split"]
