"""Run as a script by ``test_resume``: converts with --resume in children that are killed with SIGKILL, until one ends well.

``killed_job.py SOURCE DESTINATION operations`` kills the n-th child at its n-th operation on a file of the work directory: at
every point of the protocol at least once. ``... SEED`` kills children after random times instead, and keeps activations in files. Prints one line for each kill:
how many blocks were finished then.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch

torch.set_num_threads(1)

import transformers.models.llama.modeling_llama  # noqa: F401  # before the first fork

import lowbit
from lowbit.calibration import job, workdir
from lowbit.calibration.wishes import Wishes
from lowbit.convert import convert
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule

job.COMMIT_SHARE = float("inf")  # commit every block, however long that takes


def make_registry():
    spec = spec_from_file_location("calibration_quantizers", Path(__file__).with_name("quantizers.py"))
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    registry = lowbit.installed()
    registry.quantizers.register(module.BlockQuantizer())
    return registry


def die_at(number):
    """Kill this process at its ``number``-th operation on a file."""
    count = 0

    def watched(operation):
        def run(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return run

    workdir.save_file = watched(workdir.save_file)
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "write_text"), (Path, "mkdir")):
        setattr(owner, name, watched(getattr(owner, name)))


def child(source, destination, registry, offload, operation):
    process = os.fork()
    if process:
        return process
    try:
        if operation:
            die_at(operation)
        wishes = Wishes(nsamples=6, seqlen=16, batch_size=4, resume=True, offload=offload)
        convert(source, destination, Target("native"), registry, Recipe(Rule("*", "needs-block")), calibrating=wishes)
    except BaseException:  # noqa: BLE001  # nothing may go on in a child
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finished_blocks(destination):
    state = workdir.work_path(destination) / workdir.STATE
    return json.loads(state.read_text())["done"] if state.exists() else 0


def main(source, destination, how):
    registry, delays = make_registry(), random.Random(how)
    for number in range(1, 200):
        process = child(source, destination, registry, how.isdecimal(), number if not how.isdecimal() else 0)
        if how.isdecimal():
            time.sleep(delays.uniform(0, 0.05 * number))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
        sys.stdout.write(f"{finished_blocks(destination)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
