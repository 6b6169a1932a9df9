"""LendingClub: loans by the state of the borrower."""

from collections.abc import Sequence
from types import MappingProxyType

from atoll.data.catalog.bundled import read_bundled
from atoll.data.dataset import FederatedDataset
from atoll.data.frames import Frame
from atoll.data.table import table

# Declared, so that x has the same columns for every seed: few loans have the lowest grades.
_CATEGORIES = MappingProxyType(
    {
        "term": ("term_36", "term_60"),
        "sub_grade": tuple(f"{letter}{number}" for letter in "ABCDEFG" for number in range(1, 6)),
        "verification_status": ("Not_Verified", "Source_Verified", "Verified"),
        "emp_length": (
            "emp_lt_1",
            *(f"emp_{years}" for years in range(1, 10)),
            "emp_ge_10",
            "emp_unk",
        ),
    }
)


def lending_club_frame() -> Frame:
    """The 9,857 loans as a table: addr_state, 21 features, Class ("good" or "bad")."""
    return read_bundled("lending_club.csv.gz")


def lending_club(
    *,
    test: float = 0.2,
    validation: float = 0.0,
    seed: int = 0,
    stratify: bool = True,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    standardise: bool = True,
) -> FederatedDataset:
    """Loans that went bad, by state.

    Args:
        test: fraction of each state's loans for test; a state too small for one test loan keeps all for training.
        validation: fraction of each state's loans for validation.
        seed: of the cut.
        stratify: whether the cut keeps each state's share of bad loans.
        features: the columns to use; by default all 21.
        drop: columns to leave out.
        standardise: whether numbers are shifted to mean 0 and scaled to variance 1, federated.

    Returns:
        The dataset: x float32 [n, features], y int64 [n], 1 for a bad loan.

    Source: R package modeldata (MIT).
    """
    recipe = table(
        client="addr_state",
        target="Class",
        features=features,
        test=test,
        validation=validation,
        seed=seed,
        stratify=stratify,
        standardise=standardise,
        positive="bad",
        categories=_CATEGORIES,
        drop=drop,
        name="lending_club",
    )
    return recipe.bind(lending_club_frame())
