"""Grade the exercises in students' folders.

    python tests/grade.py students/* --json grades.json

Grading runs the programs of strangers, so a container is the place for it, for example

    docker run --rm -v "$PWD":/class:ro -v "$PWD/grades":/grades -w /class python:3.12 sh -c \\
        "pip install -qr requirements.txt && python tests/grade.py students/* --json /grades/a.json"

The tests see one file of the student, that of the exercise. All other files come from this
repository. Each exercise runs in a process of its own with a time limit, so a file that hangs or
ends the process costs its own points only. The process proves that its report comes from the tests:
it prints the report behind a secret word, which it has read before the student's file is imported.
"""
import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from handout import EXERCISES, ROOT, copy_to

# The points of each test. The cases of a test share them equally. All together are 100.
POINTS = {
    1: {"test_the_mean_of_W2_stays_there": 6, "test_adamw_follows_the_law": 2},
    2: {"test_entries_of_W_eff": 4, "test_gradients_reach_W_and_the_multipliers": 1},
    3: {"test_a_layer_becomes_plain": 3, "test_the_copy_has_the_same_function": 2,
        "test_the_original_stays_as_it_was": 2, "test_frozen_and_eval_layers_stay_so": 3},
    4: {"test_each_matrix_gets_the_multipliers_of_the_paper": 5,
        "test_unknown_words_are_errors": 1},
    5: {"test_pairs_turn_by_their_angles": 5, "test_the_dtype_is_that_of_x": 1},
    6: {"test_equal_scores_give_the_mean": 3, "test_no_token_sees_a_later_one": 5,
        "test_scores_are_rotated_q_k_by_the_root_of_D": 4},
    7: {"test_steps_change_only_the_singular_values": 6, "test_zeros_stay_zeros": 1,
        "test_the_dtype_is_that_of_G": 1},
    8: {"test_ten_steps_are_those_of_torch": 5, "test_settings_are_those_of_the_group": 3,
        "test_decay_uses_the_lr_before_adjustment": 2,
        "test_a_parameter_without_a_gradient_stays": 2,
        "test_a_closure_computes_the_gradients": 1},
    9: {"test_each_parameter_is_in_one_group": 3, "test_muon_gets_the_matrices_of_the_blocks": 3,
        "test_lr_and_weight_decay_of_each_kind": 3,
        "test_multipliers_count_in_the_clip_norm_if_asked": 1,
        "test_S_scales_the_blocks_and_the_head": 2,
        "test_placement_mlp_scales_the_mlps_alone": 1},
    10: {"test_gradients_that_count_are_scaled": 3, "test_a_multiplier_may_count": 1,
         "test_the_norms_are_those_before_clipping": 1,
         "test_a_parameter_without_a_gradient_is_skipped": 2},
    11: {"test_gradients_are_those_of_equation_4": 6, "test_sums_are_float32": 1},
    12: {"test_mean_and_half_the_width": 5}}


class Recorder:
    """A plugin of pytest. `cases` becomes {test: its cases}, and `outcomes` becomes {case: "", or a
    sentence about its failure}."""

    def __init__(self):
        self.cases = {}
        self.outcomes = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.cases.setdefault(item.originalname, []).append(item.nodeid)

    def pytest_runtest_makereport(self, item, call):
        # pytest calls this after setup, call and teardown of a case.
        if call.excinfo is not None:
            words = call.excinfo.exconly().split()
            self.outcomes[item.nodeid] = " ".join(words)[:300]
        elif call.when == "call":
            self.outcomes[item.nodeid] = ""


def run_tests(marks, *options):
    """Run the tests with these marks in this process. Returns pytest's exit code and a Recorder."""
    recorder = Recorder()
    command = [str(ROOT / "tests/exercises.py"), "-m", marks, *options]
    # Without pythonpath, sys.path alone says where the student's file is. Without the plugin
    # unraisableexception, pytest collects no garbage at the end: that takes longer than the tests.
    command += ["-o", "pythonpath=", "-p", "no:unraisableexception", "-p", "no:cacheprovider"]
    code = pytest.main(command, plugins=[recorder])
    return code, recorder


def child(number):
    """What the process of an exercise does: read the secret word, run the tests, print a report."""
    word = sys.stdin.read()
    code, recorder = run_tests(f"exercise{number}")
    report = json.dumps([code, recorder.outcomes])
    print(f"\n{word}{report}")


def run_child(number, place, seconds):
    """The report of a process that runs in the folder `place`. ValueError if there is none."""
    word = secrets.token_hex()
    command = [sys.executable, "-c", f"import grade; grade.child({number})"]
    environment = os.environ | {"PYTHONPATH": f"{place}/tests", "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, cwd=place, env=environment, input=word, timeout=seconds, encoding="utf-8",
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError(f"stopped after {seconds:g} seconds") from None
    for line in run.stdout.splitlines():
        if line.startswith(word):
            return json.loads(line.removeprefix(word))
    raise ValueError("the process ended before the tests did")


def judge(number, cases, code, outcomes):
    """(points, a line for each test that failed) of an exercise. ValueError if the tests did not
    run to their end, or if a test ran that this repository does not have."""
    # pytest's exit codes: 0, all passed; 1, some failed; the others, something stopped the tests.
    if code > 1:
        raise ValueError(f"the tests were stopped: pytest ended with {code}")
    points = 0
    reasons = []
    for test, worth in POINTS[number].items():
        # A case that did not run has failed.
        found = [outcomes.pop(case, "did not run") for case in cases[test]]
        failed = [sentence for sentence in found if sentence]
        points += worth * (1 - len(failed) / len(found))
        if failed:
            reasons.append(f"{test}: {failed[0]}")
    if outcomes:
        raise ValueError(f"unknown tests ran: {list(outcomes)}")
    return round(points, 2), "\n".join(reasons)


def grade(folder, cases, seconds, number):
    """The result of one exercise of one student, with the keys of Gradescope."""
    file, name = EXERCISES[number]
    with tempfile.TemporaryDirectory() as place:
        try:
            copy_to(Path(place))
            shutil.copy(Path(folder, file), place)
            report = run_child(number, place, seconds)
            score, output = judge(number, cases, *report)
        except (OSError, ValueError) as error:
            score = 0.0
            output = str(error)
    return {"name": f"exercise {number}: {name}", "score": score, "output": output,
            "max_score": sum(POINTS[number].values())}


def write_json(path, content):
    """Write the whole file or nothing, so that an interrupted run leaves a readable file."""
    new = Path(f"{path}.new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    new.replace(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Points for each exercise of each student.")
    parser.add_argument("folders", nargs="+", help="one for each student")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of an exercise")
    parser.add_argument("--json", help="write points and reasons to this file")
    parser.add_argument("--gradescope", help="write Gradescope's results.json, for one folder")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        if not Path(folder).is_dir():
            parser.exit(2, f"{folder} is not a folder.\n")
    _, collected = run_tests("", "--collect-only", "-qqq")
    pool = ThreadPoolExecutor(os.cpu_count())
    grades = {}
    for folder in options.folders:
        # The exercises of a student run side by side, as many as there are cores.
        grade_one = partial(grade, folder, collected.cases, options.seconds)
        results = list(pool.map(grade_one, EXERCISES))
        points = [result["score"] for result in results]
        print(f"{sum(points):5g} = sum of {points}  {folder}", flush=True)
        grades[folder] = results
        if options.json:
            write_json(options.json, grades)
        if options.gradescope:
            write_json(options.gradescope, {"tests": results})


if __name__ == "__main__":
    main()
