"""A run in miniature must give the numbers in golden.json: every step of every stage.

This catches what no property names. When a change means to change the numbers, renew the file, and
look at what `git diff` says of it:

    python tests/test_golden.py

Why it holds on other machines, too:

- Everything is in fp32 (bits=16); 4-bit kernels would round differently on each processor.
- Texts are drawn by inversion from torch.rand, which is the same everywhere (see conftest). A text
  changes only where a draw falls within rounding of the border between two tokens, and the command
  above says how close the closest draw came. Where that is under 1e-6, take another seed.
- Numbers are compared with tolerances. On one processor, one and two threads, and AVX-512, AVX2 and
  plain kernels (ATEN_CPU_CAPABILITY, MKL_CBWR, ONEDNN_MAX_CPU_ISA) differed by up to 0.4%, or 6e-5
  near 0; TOLERANCE and NEAR_0 allow two and eight times as much. One thing differs more: the mean
  score. A Bradley-Terry loss does not see what all scores have in common, so the gradient of the
  head's bias is rounding and nothing else, and Adam makes a whole step of it. SHIFT allows for the
  two steps of this run; 0.004 was seen.
"""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import run_miniature

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-2  # relative
NEAR_0 = 5e-4
SHIFT = 1e-2  # absolute, of numbers that are mean scores
MEAN_SCORES = ("score", "no_change")


def numbers_of(folder):
    """metrics.jsonl as {stage: {metric: [one number per step]}}, and what was held out."""
    numbers = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        stage = numbers.setdefault(row.pop("stage"), {})
        for name, value in row.items():
            stage.setdefault(name, []).append(value)
    held_out = json.loads((folder / "results.json").read_text(encoding="utf-8"))["reward"]
    for role, measured in held_out.items():
        rounded = {name: round(value, 6) for name, value in measured.items()}
        numbers[f"{role}, held out"] = rounded
    return numbers


def test_every_step_of_every_stage_has_its_golden_numbers(miniature):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    numbers = numbers_of(miniature)
    assert list(numbers) == list(golden)
    for stage in golden:
        # stage by stage: the first that differs is where the change is
        expected = {}
        for name, value in golden[stage].items():
            near_0 = SHIFT if name in MEAN_SCORES else NEAR_0
            expected[name] = pytest.approx(value, rel=TOLERANCE, abs=near_0)
        assert numbers[stage] == expected, f"{stage} differs. Meant to? python {__file__}"


def main():
    with tempfile.TemporaryDirectory() as folder:
        closest = run_miniature(Path(folder) / "run")
        numbers = numbers_of(Path(folder) / "run")
    stages = [f"{json.dumps(stage)}: {json.dumps(rows)}" for stage, rows in numbers.items()]
    GOLDEN.write_text("{\n" + ",\n".join(stages) + "\n}\n", encoding="utf-8")
    print(f"\n{GOLDEN} is new. The closest draw was {closest:.0e} from another token.")


if __name__ == "__main__":
    main()
