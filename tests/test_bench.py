"""`yolokd bench` on tiny models, and SL2 against Ultralytics' own."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import pytest
import torch
from ultralytics.nn.distill_model import DistillationModel

from yolokd import UserError
from yolokd.bench import run_bench
from yolokd.bench.contender import Seconds
from yolokd.bench.rounds import Rounds
from yolokd.methods.sl2 import SL2
from yolokd.pyramid import Level, LevelShape


def test_sl2_is_ultralytics_own_loss() -> None:
    torch.manual_seed(0)
    method = SL2(LevelShape(8, 3, 5))
    level = Level(8, torch.randn(2, 3, 4, 6), torch.randn(2, 5, 4, 6), None, torch.randn(2, 7, 4, 6))
    assert level.teacher_logits is not None
    scores = level.teacher_logits.flatten(2).sigmoid().amax(1, keepdim=True)
    theirs = DistillationModel.loss_sl2(None, method.project(level.student), level.teacher, 0, (scores,))
    assert float(method(level).detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_bench_measures_every_contender(data: str, tmp_path: Path) -> None:
    out = run_bench(
        teacher="yolov8n.yaml,yolov8s.yaml", imgsz=32, batch=2, method="native,dfd+sl2", amp="False,bf16", rounds=2,
        data=data, project=str(tmp_path), memory=False,
    )  # fmt: skip
    with open(out / "bench.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {(r["teacher"], r["contender"], r["amp"]) for r in rows} >= {
        (t, c, a)
        for t in ("yolov8n.yaml", "yolov8s.yaml")
        for c, a in (
            ("none", "False"),
            ("none", "bf16"),
            ("native", "False"),
            ("dfd+sl2", "False"),
            ("dfd+sl2", "bf16"),
        )
    }
    for row in rows:
        assert float(row["fastest"]) <= float(row["step"]) <= float(row["slowest"])
        assert float(row["images_per_second"]) == pytest.approx(2 / float(row["step"]), rel=0.01)
        assert (float(row["teacher_seconds"]) > 0) == (row["contender"] != "none")
        assert float(row["times_native"]) > 0
    assert cv2.imread(str(out / "bench.png")) is not None


def test_the_peak_memory_is_that_of_a_process_of_its_own(data: str, tmp_path: Path) -> None:
    ballast = torch.ones(2**28)  # 1 GiB here must not count there
    out = run_bench(
        imgsz=32, batch=2, method="none", rounds=1, teacher="yolov8n.yaml", data=data, project=str(tmp_path)
    )
    with open(out / "bench.csv", encoding="utf-8") as f:
        (row,) = csv.DictReader(f)
    assert 100 < float(row["peak_mib"]) < ballast.nbytes / 2**20 + 200


def test_ratios_pair_the_steps_of_a_round() -> None:
    """A machine that slows down in one round slows all of it."""
    rounds = Rounds()
    for slow in (1, 10, 100):
        rounds.add("a", Seconds(4.0 * slow, 0, 0))
        rounds.add("b", Seconds(1.0 * slow, 0, 0))
        rounds.add("c", Seconds(1.0 * slow, 0, 0))
    assert rounds.ratio("a", "b", "c") == 2
    assert rounds.median("a") == 40


@pytest.mark.parametrize("keys", [{"rounds": 0}, {"method": "dfx"}, {"teacher": "nothere.pt"}, {"epoch": 3}])
def test_bad_input_leaves_nothing(keys: dict[str, object], data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run_bench(**{"teacher": "yolov8n.yaml", "method": "dfd", "data": data, "project": str(tmp_path / "p")} | keys)  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()
