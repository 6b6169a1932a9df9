"""What there is to know about a data set before using it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from atoll.errors import unknown


@dataclass(frozen=True, slots=True)
class Card:
    """A data set in words.

    Attributes:
        name: the function in `atoll.datasets`.
        title: what it is.
        source: where it comes from.
        licence: under which terms.
        clients: who owns the examples.
        target: what is predicted.
        examples: how many.
        access: "bundled", "scikit-learn" or "download".
        traps: what is easily done wrong, and what Atoll does about it.
    """

    name: str
    title: str
    source: str
    licence: str
    clients: str
    target: str
    examples: int
    access: str
    traps: tuple[str, ...]


_CARDS = (
    Card(
        name="heart_disease",
        title="UCI Heart Disease: patients sent for angiography at four hospitals, 13 measurements each",
        source="Janosi, Steinbrunn, Pfisterer and Detrano 1989, UCI Machine Learning Repository, doi:10.24432/C52P4X",
        licence="CC BY 4.0",
        clients="4 hospitals: Cleveland 303, Hungary 294, Switzerland 123, VA Long Beach 200 patients",
        target="disease: 1 when a coronary artery is narrowed by half or more (139, 106, 115, 149 patients)",
        examples=920,
        access="bundled",
        traps=(
            "Patient 304 is labelled Cleveland but is Hungary's first; corrected on reading.",
            "A cholesterol of 0 means missing (all of Switzerland, 49 at VA Long Beach), and so does the one resting "
            "blood pressure of 0; both are read as missing.",
            "slope, ca and thal are mostly missing outside Cleveland.",
            "Switzerland has 8 healthy patients of 123: a test of a third holds 2 or 3, and its AUC is noisy.",
        ),
    ),
    Card(
        name="lending_club",
        title="LendingClub: personal loans with what was known when they were granted",
        source="R package modeldata, lending_club",
        licence="MIT",
        clients="50 states of the borrower's address (49 and Washington, D.C.), 16 to 1,324 loans each",
        target="Class: 1 when the loan went bad (517 of 9,857)",
        examples=9857,
        access="bundled",
        traps=(
            "5 % of the loans are bad: a model that never warns is 95 % accurate. Use AUC, average precision and "
            "calibration.",
            "The state is the client, not a feature.",
            "Small states hold one bad loan or none; their AUC is undefined.",
        ),
    ),
    Card(
        name="breast_cancer",
        title="Breast Cancer Wisconsin (Diagnostic): 30 measurements of cell nuclei",
        source="Wolberg, Mangasarian, Street and Street 1993, doi:10.24432/C5DW2B, as shipped with scikit-learn",
        licence="CC BY 4.0",
        clients="none: dealt out by a partitioner",
        target="diagnosis: 1 when malignant (212 of 569)",
        examples=569,
        access="scikit-learn",
        traps=("scikit-learn codes malignant as 0; here malignant is 1.",),
    ),
    Card(
        name="digits",
        title="Optical recognition of handwritten digits: images of 8 x 8 pixels",
        source="Alpaydin and Kaynak 1998, doi:10.24432/C50P49, as shipped with scikit-learn",
        licence="CC BY 4.0",
        clients="none: dealt out by a partitioner",
        target="the digit, 0 to 9",
        examples=1797,
        access="scikit-learn",
        traps=(
            "Pixels are 0 to 16; here they are divided by 16.",
            "The writers are not recorded: a test drawn at random shares writers with training.",
        ),
    ),
    Card(
        name="mnist",
        title="MNIST: handwritten digits, images of 28 x 28 pixels",
        source="LeCun, Cortes and Burges, the four canonical idx files",
        licence="CC BY-SA 3.0",
        clients="none: dealt out by a partitioner; the official 10,000 test images are the holdout",
        target="the digit, 0 to 9",
        examples=70000,
        access="download",
        traps=(
            "Fashion-MNIST uses the same file names: the files' checksums are compared.",
            "Published federated results differ in the partition: 100 clients of 600 images, IID or two shards each.",
        ),
    ),
    Card(
        name="smartwatch",
        title="Shoulder exercises from smart-watches: windows of acceleration and rotation, 50 Hz",
        source="Burns, Leung, Hardisty, Whyne, Henry and McLachlin 2018, arXiv:1802.01489, by way of seglearn",
        licence="BSD 3-Clause",
        clients="10 wearers with 14 recordings each: 7 exercises with either arm",
        target="the exercise, 0 to 6: PEN, ABD, FEL, IR, ER, TRAP, ROW",
        examples=3203,
        access="bundled",
        traps=(
            "Windows overlap: cut at random, the test would hold samples of training. Here a stretch of every "
            "recording is the test, and whole stretches can be cut for validation.",
            "A new wearer is harder than another stretch of a known one: leave wearers out to know how much.",
        ),
    ),
    Card(
        name="spoken_digits",
        title="Free Spoken Digit Dataset: recordings of ten digits, as log-mel spectrograms",
        source="Jackson et al. 2018, doi:10.5281/zenodo.1342401",
        licence="CC BY-SA 4.0",
        clients="6 speakers with 500 recordings each: 50 of each digit",
        target="the digit, 0 to 9",
        examples=3000,
        access="download",
        traps=(
            "Recordings of one speaker were made in one sitting: test a model on speakers it has not heard, too.",
            "Silence was cut off at both ends: how long a recording is tells something about the digit.",
        ),
    ),
    Card(
        name="movielens",
        title="MovieLens-100k: stars for films, every user a client",
        source="Harper and Konstan 2015, doi:10.1145/2827872; GroupLens",
        licence="research only, not to be passed on",
        clients="943 users with 20 to 737 ratings each",
        target="1 to 5 stars",
        examples=100000,
        access="download",
        traps=(
            "Published errors differ in the cut: by time is harder than at random. Here it is at random, user by user.",
            "A model that knows means of users and films is hard to beat: root mean squared error about 0.96.",
        ),
    ),
    Card(
        name="traffic_signs",
        title="GTSRB: German traffic signs, every third picture at 32 x 32 pixels, seen by a fleet",
        source="Stallkamp, Schlipsing, Salmen and Igel 2012, doi:10.1016/j.neunet.2012.02.016",
        licence="free for research",
        clients="vehicles that drive past tracks, one physical sign each; the official test is the holdout",
        target="the kind of sign, 0 to 42",
        examples=17710,
        access="download",
        traps=(
            "Pictures of a track show one sign: cut picture by picture, the test would be known by heart.",
            "There are from 3 to 25 signs of a kind.",
        ),
    ),
)

_BY_NAME: Mapping[str, Card] = MappingProxyType({entry.name: entry for entry in _CARDS})


def names() -> tuple[str, ...]:
    """The names of the data sets in the catalog."""
    return tuple(_BY_NAME)


def card(name: str) -> Card:
    """What there is to know about a data set.

    Raises:
        InvalidArgument: when the catalog has no such name.
    """
    if name not in _BY_NAME:
        raise unknown("name", name, list(_BY_NAME))
    return _BY_NAME[name]
