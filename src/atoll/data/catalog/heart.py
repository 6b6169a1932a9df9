"""UCI Heart Disease: four hospitals that never shared a patient."""

from collections.abc import Sequence
from types import MappingProxyType

from atoll.data.catalog.bundled import read_bundled
from atoll.data.dataset import FederatedDataset
from atoll.data.frames import Frame
from atoll.data.table import table

_MISLABELLED = 304

# Declared, so that x has the same columns for every seed: few patients have some of these values.
_CATEGORIES = MappingProxyType(
    {
        "sex": ("Female", "Male"),
        "cp": ("asymptomatic", "atypical angina", "non-anginal", "typical angina"),
        "fbs": ("False", "True"),
        "restecg": ("lv hypertrophy", "normal", "st-t abnormality"),
        "exang": ("False", "True"),
        "slope": ("downsloping", "flat", "upsloping"),
        "thal": ("fixed defect", "normal", "reversable defect"),
    }
)
_INCOMPLETE = ("trestbps", "chol", "fbs", "thalch", "exang", "oldpeak", "slope", "ca", "thal")


def heart_disease_frame(*, zeros: bool = False) -> Frame:
    """The 920 patients as a table: hospital, 13 features, disease.

    Args:
        zeros: keep a cholesterol or blood pressure of 0 as it is written instead of as missing. Published results
            that count 303, 261, 46 and 130 patients without missing values keep them.

    Returns:
        A frame with the columns hospital, age (years), sex, cp (chest pain), trestbps (resting blood pressure,
        mm Hg), chol (serum cholesterol, mg/dl), fbs (fasting blood sugar above 120 mg/dl), restecg, thalch (highest
        heart rate, 1/min), exang (angina on exercise), oldpeak (ST depression, mm), slope, ca (coloured vessels),
        thal, disease (0 or 1).
    """
    frame = read_bundled("heart_disease_uci.csv")
    frame.loc[frame["id"] == _MISLABELLED, "dataset"] = "Hungary"
    if not zeros:
        for column in ("chol", "trestbps"):
            frame[column] = frame[column].mask(frame[column] == 0)
    frame["disease"] = (frame["num"] > 0).astype("int64")
    return frame.drop(columns=["id", "num"]).rename(columns={"dataset": "hospital"})


def heart_disease(
    *,
    test: float = 0.34,
    validation: float = 0.0,
    seed: int = 0,
    stratify: bool = True,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    standardise: bool = True,
) -> FederatedDataset:
    """Heart disease at four hospitals: Cleveland, Hungary, Switzerland and VA Long Beach.

    Args:
        test: fraction of each hospital's patients for test.
        validation: fraction of each hospital's patients for validation.
        seed: of the cut.
        stratify: whether the cut keeps each hospital's share of patients with disease.
        features: the columns to use; by default all 13.
        drop: columns to leave out; slope, ca and thal are mostly missing outside Cleveland.
        standardise: whether numbers are shifted to mean 0 and scaled to variance 1, federated.

    Returns:
        The dataset: x float32 [n, features], y int64 [n], 1 for disease.

    Source: Janosi, Steinbrunn, Pfisterer and Detrano 1989, doi:10.24432/C52P4X (CC BY 4.0).
    """
    recipe = table(
        client="hospital",
        target="disease",
        features=features,
        test=test,
        validation=validation,
        seed=seed,
        stratify=stratify,
        standardise=standardise,
        classes=(0, 1),
        categories=_CATEGORIES,
        indicators=_INCOMPLETE,
        drop=drop,
        name="heart_disease",
    )
    return recipe.bind(heart_disease_frame())
