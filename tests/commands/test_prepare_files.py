"""What `prepare` leaves alone, whom it keeps to itself, and what it says of changed files."""

import dataclasses
import gzip
import os
import shutil

import pytest
from preparing import DATA, SIZE, run

from deepsc_jax.data import datasets, preparation, records, store
from deepsc_jax.evaluation import sources
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import InputError


def test_a_whole_store_is_said_to_be_whole_and_damage_is_named(phantoms, tmp_path):
    shutil.copytree(phantoms / "store", tmp_path / "store")
    done = run("--verify", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "4 cases, 31 of 31 files whole" in done.stdout  # of the lesion-free one no lesion voxels

    flipped = tmp_path / "store/cases/phantom-test-0000/volume/c/0/0/0"
    content = bytearray(flipped.read_bytes())
    content[1000] ^= 4
    flipped.write_bytes(content)
    gone = tmp_path / "store/cases/phantom-train-0001/lung/c/0/0/0"
    gone.unlink()
    done = run("--verify", f"--out={tmp_path.as_uri()}")
    assert done.returncode == 1
    assert "29 of 31 files whole" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, path, what in zip(errors, (gone, flipped), ("missing", "not as it was"), strict=True):
        assert f"{path.relative_to(tmp_path)}: {what}" in line
    (tmp_path / "store/index.json").write_bytes(b"{}")
    done = run("--verify", f"--out={tmp_path}")
    assert done.returncode == 1
    assert "index.json: version None found" in done.stderr


@pytest.mark.parametrize("kind", records.SOURCES)
def test_a_source_that_changed_or_went_missing_is_named(source_case, tmp_path, kind):
    assert preparation.prepare([source_case], tmp_path, DATA, workers=1) == []
    (record,) = store.Store(tmp_path / "store").cases()
    assert set(record.sums) == set(records.SOURCES)
    opened = store.Store(tmp_path / "store")
    assert sources.source_case(opened, record, "hu").lesion.any()
    path = getattr(source_case, kind)
    content, before = path.read_bytes(), path.stat()
    # The same image in other bytes; what cannot be read; another image that cannot fit.
    for changed in (content + bytes(8), content[:-1], gzip.compress(b"another")):
        path.write_bytes(changed)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        words = f"own: its {kind.replace('_', ' ')} {path} has changed since it was prepared"
        with pytest.raises(InputError, match=words):
            sources.source_case(opened, record, "hu")
    path.unlink()
    with pytest.raises(InputError, match=f"{path} is gone since it was prepared"):
        sources.source_case(opened, record, "hu")
    path.write_bytes(content)
    assert sources.source_case(opened, record, "hu").lesion.any()


@pytest.mark.parametrize(
    "foreign",
    [
        "store.partial/notes.txt",
        "store.partial/cases/mine/scan.nii.gz",
        "store.partial/cases/phantom-train-0000/volume/mask.nii",
        "store.replaced/notes.txt",
        "store/notes.txt",
        "store/cases/phantom-train-0000/lesion/corrected.nii.gz",
    ],
)
def test_what_prepare_did_not_write_is_not_removed(phantoms, tmp_path, foreign):
    cases = datasets.read_cases(phantoms / "cases.csv")[:1]
    if foreign.startswith("store/"):
        preparation.prepare(cases, tmp_path, DATA, workers=1)
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=f"{path}: not written by prepare"):
        preparation.prepare(cases, tmp_path, DATA, workers=1, overwrite=True)
    assert path.read_text() == "mine"
    assert (tmp_path / "store").exists() == foreign.startswith("store/")


def test_a_folder_named_store_that_is_none_is_not_replaced(phantoms, tmp_path):
    cases = datasets.read_cases(phantoms / "cases.csv")[:1]
    (tmp_path / "store/cases").mkdir(parents=True)
    (tmp_path / "store/index.json").write_text("{}")
    with pytest.raises(InputError, match="store: exists and is not a store that prepare wrote"):
        preparation.prepare(cases, tmp_path, DATA, workers=1, overwrite=True)
    (tmp_path / "store/index.json").unlink()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"store\.partial: not a folder of prepare's own"):
        preparation.prepare(cases, tmp_path, DATA, workers=1)


def test_a_case_list_in_the_folder_stays_as_it_is(phantoms, tmp_path):
    cases = datasets.read_cases(phantoms / "cases.csv")
    datasets.write_cases(cases, tmp_path / "cases.csv")
    datasets.write_cases(cases[:1], tmp_path / "subset.csv")
    before = (tmp_path / "cases.csv").read_bytes()
    done = run(f"--cases={tmp_path / 'subset.csv'}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cases.csv").read_bytes() == before
    done = run("--phantoms=1,0,0", "--phantom_size=48", f"--out={tmp_path}", "--overwrite")
    assert done.returncode == 1
    assert f"{tmp_path / 'cases.csv'}: was not written here" in done.stderr
    assert (tmp_path / "cases.csv").read_bytes() == before


def test_phantoms_that_are_there_are_left_and_other_files_of_their_names_refused(tmp_path):
    write_phantoms([1, 0, 0], tmp_path, seed=5, size=SIZE, workers=1)
    files = sorted((tmp_path / "scans").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    write_phantoms([1, 0, 0], tmp_path, seed=5, size=SIZE, workers=1)
    assert [path.stat().st_mtime_ns for path in files] == times
    corrected = tmp_path / "scans/phantom-train-0000-lesion.nii.gz"
    corrected.write_bytes(gzip.compress(b"mine"))
    content = corrected.read_bytes()
    with pytest.raises(InputError, match=f"{corrected}: exists and is another file"):
        write_phantoms([1, 0, 0], tmp_path, seed=5, size=SIZE, workers=1)
    assert corrected.read_bytes() == content


def test_private_stores_name_no_patient_and_are_their_owners_alone(phantoms, tmp_path):
    rows = [
        f"{case.name},Jane DOE,train,covid-19,{case.scan},{case.lesion_mask},{case.lung_mask}"
        for case in datasets.read_cases(phantoms / "cases.csv")[:1]
    ]
    (tmp_path / "cases.csv").write_text("\n".join((",".join(datasets.COLUMNS), *rows)))
    hashed = []
    for name in ("one", "two"):
        out = tmp_path / name
        done = run(f"--cases={tmp_path / 'cases.csv'}", f"--out={out}", "--private")
        assert done.returncode == 0, done.stderr
        files = [path for path in out.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert not any(b"Jane" in path.read_bytes() for path in files)
        assert {path.name for path in (out / "store").iterdir()} == {"index.json", "cases"}
        hashed.append(store.Store(out / "store").cases()[0].patient)
    assert hashed[0] != hashed[1]  # each store has a salt of its own


def test_scans_of_one_patient_have_one_hash_and_it_outlasts_a_stop(phantoms, tmp_path):
    cases = [
        dataclasses.replace(case, patient=patient)
        for case, patient in zip(
            datasets.read_cases(phantoms / "cases.csv"), ("P1", "p1", "p2", "p2"), strict=True
        )
    ]
    salt = tmp_path / "salt"
    one, again, other, _ = (c.patient for c in preparation._pseudonymised(cases, salt))
    assert one == again != other
    assert next(c.patient for c in preparation._pseudonymised(cases, salt)) == one


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("gs://bucket/folder", "--out=gs://bucket/folder: is an address"),
        ("{tmp}/file", "there is a file"),
        ("{tmp}/file/below", "cannot be written to"),
        ("/proc/store", "cannot be written to"),
        ("{tmp}/" + "x" * 300, "cannot be written to"),
    ],
)
def test_places_that_take_no_store_are_refused_before_the_work(phantoms, tmp_path, out, words):
    (tmp_path / "file").write_text("mine")
    done = run(f"--cases={phantoms / 'cases.csv'}", f"--out={out.format(tmp=tmp_path)}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --out")
    assert words in line
    assert done.stdout == ""


def test_a_tilde_is_the_home_folder(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.write_cases(datasets.read_cases(phantoms / "cases.csv")[:1], tmp_path / "one.csv")
    done = run("--cases=~/one.csv", "--out=~/made")
    assert done.returncode == 0, done.stderr
    assert len(store.Store(tmp_path / "made/store").cases()) == 1
