"""Clients and their examples: the packed dataset, its readers, partitioners, tables and the catalog."""

from atoll.data.dataset import ClientData, FederatedDataset, Split
from atoll.data.preprocessing import Preprocessing
from atoll.data.table import Table, table

__all__ = ["ClientData", "FederatedDataset", "Preprocessing", "Split", "Table", "table"]
