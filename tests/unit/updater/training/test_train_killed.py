"""``kill -9`` of training at every step, and while a checkpoint is written: what goes on ends in the same adapter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STEPS, EVERY = 4, 2
ROOT = Path(__file__).parents[4]
SCRIPT = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tiny import tiny_base
from tests.unit.updater.builders import LIMITS, recipe, run
from updater.training import checkpoint
from updater.step.learner import Learner

home, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
base = tiny_base(home)
real_backward, real_save = Learner.forward_backward, checkpoint.save_file
steps_taken = saves = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_child(folder, dies_in_backward=None, dies_in_save=None):
    'Train in a process of its own: how it ended, what it made, and how many backward passes it took.'
    result = folder / "result.json"
    child = os.fork()
    if child == 0:
        def backward(self, *given, **options):
            global steps_taken
            if steps_taken == dies_in_backward:
                die()
            steps_taken += 1
            return real_backward(self, *given, **options)
        def save(tensors, path, **options):
            global saves
            real_save(tensors, path, **options)
            if saves == dies_in_save:
                os.truncate(path, os.path.getsize(path) // 2)
                die()
            saves += 1
        Learner.forward_backward, checkpoint.save_file = backward, save
        made = run(base, folder, recipe=recipe(max_steps=steps), limits=replace(LIMITS, checkpoint_steps=every))
        result.write_text(json.dumps([made.adapter, made.losses["loss"], steps_taken]))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(result.read_text()) if result.exists() else None

told = {}
cases = {"whole": {}, **{str(n): {"dies_in_backward": n} for n in range(1, steps + 1)}, "save": {"dies_in_save": 1}}
for name, death in cases.items():
    folder = home / name
    folder.mkdir()
    told[name] = [in_child(folder, **death), *([in_child(folder)] if death else [])]
print(json.dumps(told))
"""


@pytest.mark.long
def test_training_that_is_killed_anywhere_goes_on_and_ends_in_the_same_adapter(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(STEPS), str(EVERY)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ((status, (adapter, losses, passes)),) = told.pop("whole")
    assert (status, passes) == (0, 1 + STEPS)  # the first measures what a step costs
    repeated = {}
    for name, ((killed, nothing), (ended, (resumed, same_losses, again))) in told.items():
        assert (killed, nothing, ended) == (-signal.SIGKILL, None, 0), name
        assert (resumed, same_losses) == (adapter, losses), name
        repeated[name] = again
    # Killed in backward pass n: the cost is kept after the first, and then every second step.
    assert repeated == {"1": 4, "2": 4, "3": 2, "4": 2, "save": 2}
