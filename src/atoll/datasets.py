"""The catalog of data sets (`atoll.datasets.heart_disease()`), with a card on each."""

from atoll.data.catalog import (
    Card,
    breast_cancer,
    card,
    digits,
    heart_disease,
    heart_disease_frame,
    lending_club,
    lending_club_frame,
    mnist,
    movielens,
    names,
    smartwatch,
    spoken_digits,
    traffic_signs,
)

__all__ = [
    "Card",
    "breast_cancer",
    "card",
    "digits",
    "heart_disease",
    "heart_disease_frame",
    "lending_club",
    "lending_club_frame",
    "mnist",
    "movielens",
    "names",
    "smartwatch",
    "spoken_digits",
    "traffic_signs",
]
