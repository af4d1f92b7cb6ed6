"""Grade the exercises in students' folders.

    python tests/grade.py students/* --json grades.json --junit grades.xml

A test sees one file of the student, that of the exercise; the tests and the other files come from
this repository. Each exercise runs in a process of its own with a time limit, so a solution that
hangs or crashes costs its own points only. Half of the tests give half of the points.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from exercises import EXERCISES

ROOT = Path(__file__).resolve().parent.parent
POINTS = {1: 4, 2: 8, 3: 6, 4: 8, 5: 8, 6: 12, 7: 12, 8: 8, 9: 6, 10: 12, 11: 8, 12: 8}

def grade(folder, number, seconds):
    """(points, a sentence about the first failure, or "") of one exercise of one student."""
    solution = Path(folder, EXERCISES[number][0])
    if not solution.is_file():
        return 0, f"{solution.name} is missing"
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(solution, place)
        path = os.pathsep.join((place, str(ROOT)))           # the student's file comes first
        command = [sys.executable, "-m", "pytest", ROOT / "tests/exercises.py", "-m",
                   f"exercise{number}", "-p", "no:cacheprovider", "-o", "pythonpath=",
                   f"--junit-xml={place}/result.xml"]
        try:
            subprocess.run(command, cwd=place, env=os.environ | {"PYTHONPATH": path},
                           timeout=seconds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            cases = list(ElementTree.parse(f"{place}/result.xml").iter("testcase"))
        except subprocess.TimeoutExpired:
            return 0, f"stopped after {seconds:g} seconds"
        except FileNotFoundError:
            return 0, "the process died before the tests ended"
    failed = [case[0].get("message") for case in cases if len(case)]
    return (round(POINTS[number] * (1 - len(failed) / len(cases)), 1),
            failed[0].splitlines()[0] if failed else "")

def junit(grades):
    """A test suite for each student; an exercise without full points is a failure."""
    suites = ElementTree.Element("testsuites")
    for folder, results in grades.items():
        suite = ElementTree.SubElement(suites, "testsuite", name=folder)
        for n, (points, sentence) in results.items():
            case = ElementTree.SubElement(suite, "testcase", name=f"{n}: {EXERCISES[n][1]}")
            if points < POINTS[n]:
                message = f"{points} of {POINTS[n]} points: {sentence}"
                ElementTree.SubElement(case, "failure", message=message)
    return ElementTree.tostring(suites, encoding="unicode")

def main(arguments=None):
    parser = argparse.ArgumentParser(description="Points for each exercise of each student.")
    parser.add_argument("folders", nargs="+", help="one for each student")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of an exercise")
    parser.add_argument("--json", type=Path, help="write points and sentences to this file")
    parser.add_argument("--junit", type=Path, help="write a JUnit report to this file")
    options, grades = parser.parse_args(arguments), {}
    for folder in options.folders:
        if not Path(folder).is_dir():
            parser.exit(2, f"{folder} is not a folder.\n")
    print(*(f"{n:>4}" for n in POINTS), " sum  student")
    for folder in options.folders:
        grades[folder] = {n: grade(folder, n, options.seconds) for n in POINTS}
        points = [points for points, _ in grades[folder].values()]
        print(*(f"{p:>4g}" for p in (*points, sum(points))), f" {folder}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(grades, indent=1), encoding="utf-8")
    if options.junit:
        options.junit.write_text(junit(grades), encoding="utf-8")

if __name__ == "__main__":
    main()
