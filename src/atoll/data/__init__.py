"""Clients and their examples: packed and lazy datasets, their readers, partitioners, tables and the catalog."""

from atoll.data.dataset import ClientData, FederatedDataset
from atoll.data.lazy import LazyDataset
from atoll.data.packed import Split
from atoll.data.preprocessing import Preprocessing
from atoll.data.table import Table, table

__all__ = ["ClientData", "FederatedDataset", "LazyDataset", "Preprocessing", "Split", "Table", "table"]
