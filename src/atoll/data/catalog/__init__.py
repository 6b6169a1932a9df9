"""Data sets that come with Atoll, come with scikit-learn, or are fetched by name."""

from atoll.data.catalog.cards import Card, card, names
from atoll.data.catalog.heart import heart_disease, heart_disease_frame
from atoll.data.catalog.lending import lending_club, lending_club_frame
from atoll.data.catalog.mnist import mnist
from atoll.data.catalog.movielens import movielens
from atoll.data.catalog.scikit import breast_cancer, digits
from atoll.data.catalog.signs import traffic_signs
from atoll.data.catalog.smartwatch import smartwatch
from atoll.data.catalog.spoken import spoken_digits

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
