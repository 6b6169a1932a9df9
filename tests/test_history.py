"""Records of rounds, and how they are written down."""

import json
import math

from atoll.history import Record, plain

RECORD = Record(
    round=3,
    clients=2,
    train={"loss": 0.5},
    test={"loss": 0.25, "auc": math.nan},
    spread={"auc": {"mean": math.nan, "worst_decile": 0.5, "undefined": 1.0}},
    bytes_up=10,
    bytes_down=20,
    seconds={"train": 0.1},
    notes=("auc is undefined at 1 client(s)",),
)


def test_a_record_survives_json_with_its_nans() -> None:
    text = json.dumps(RECORD.to_dict(), allow_nan=False)
    back = Record.from_dict(json.loads(text))
    assert math.isnan(back.test["auc"]) and math.isnan(back.spread["auc"]["mean"])
    assert back.epsilon is None and back.notes == RECORD.notes and back.loss == 0.5
    assert back.to_dict() == RECORD.to_dict()


def test_a_record_is_one_flat_row_of_a_table() -> None:
    row = RECORD.flat()
    assert row["round"] == 3 and row["train_loss"] == 0.5 and row["test_loss"] == 0.25
    assert row["test_auc_worst_decile"] == 0.5 and row["seconds_train"] == 0.1 and row["bytes_up"] == 10
    assert "epsilon" not in row


def test_what_is_not_finite_becomes_none() -> None:
    assert plain({"a": (1.0, math.inf), "b": {"c": -math.inf}, "d": "x"}) == {
        "a": [1.0, None],
        "b": {"c": None},
        "d": "x",
    }
