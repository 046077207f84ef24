"""Case lists: what is read, what is refused, and the words it is refused with."""

import pathlib

import pytest

from deepsc_jax.data import datasets
from deepsc_jax.runtime.errors import InputError

HEADER = ",".join(datasets.COLUMNS)


@pytest.fixture
def case_list(tmp_path):
    """A function that writes a case list of the given lines, and the files that they name."""

    def write(*lines: str, encoding: str = "utf-8", make_files: bool = True) -> pathlib.Path:
        path = tmp_path / "cases.csv"
        path.write_text("\n".join((HEADER, *lines)) + "\n", encoding=encoding)
        if make_files:
            for line in lines:
                for name in line.split(",")[4:]:
                    if name:
                        (tmp_path / name).touch()
        return path

    return write


def test_reads_paths_relative_to_the_list_and_masks_that_are_absent(case_list, tmp_path):
    path = case_list("a,p1,train,covid-19,a.nii.gz,al.nii.gz,", "b,p2,test,cap,b.nii.gz,,bl.nii.gz")
    a, b = datasets.read_cases(path)
    assert a == datasets.Case(
        "a", "p1", "train", 0, tmp_path / "a.nii.gz", tmp_path / "al.nii.gz", None
    )
    assert (b.label, b.lesion_mask, b.lung_mask) == (1, None, tmp_path / "bl.nii.gz")


def test_reads_what_spreadsheets_write(case_list):
    path = case_list("a, p1, train ,cap,a.nii.gz,,", "", ",,,,,,", encoding="utf-8-sig")
    assert [(c.patient, c.split) for c in datasets.read_cases(path)] == [("p1", "train")]


def test_written_lists_read_back_and_stay_right_when_moved(case_list, tmp_path):
    inside = datasets.read_cases(case_list("a,p1,train,covid-19,a.nii.gz,al.nii.gz,"))
    elsewhere = datasets.Case("b", "p2", "test", 2, pathlib.Path("/elsewhere/b.nii.gz"))
    datasets.write_cases([*inside, elsewhere], tmp_path / "written.csv")
    assert datasets.read_cases(tmp_path / "written.csv", check_files=False) == [*inside, elsewhere]
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "written.csv").rename(moved / "written.csv")
    read = datasets.read_cases(moved / "written.csv", check_files=False)
    assert [case.scan for case in read] == [moved / "a.nii.gz", elsewhere.scan]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a,p1,train,influenza,a.nii.gz,,"], ["line 2", "'influenza'", "covid-19, cap"]),
        (["a,p1,holdout,cap,a.nii.gz,,"], ["'holdout'", "train, validation, test"]),
        (["a,p1,train,cap,a.nii.gz,,", "A,p1,train,cap,b.nii.gz,,"], ["2 lines", "rename"]),
        (["a,p1,train,cap,a.nii.gz,,", "b,p1,test,cap,b.nii.gz,,"], ["patient p1", "train", "b"]),
        (["../a,p1,train,cap,a.nii.gz,,"], ["'../a'", "letters"]),
        ([",p1,train,cap,a.nii.gz,,"], ["''", "rename"]),
        (["a,p1,train,cap,a.nii.gz,,", "b,P1,test,cap,b.nii.gz,,"], ["patient P1", "train", "b"]),
        (["a,p1,train,cap,a.nii.gz,,", "b,p2,test,cap,a.nii.gz,,"], ["scan ", "a.nii.gz", "test"]),
        (["a,,train,cap,a.nii.gz,,"], ["patient is empty"]),
        (["a,p1,train,cap,,,"], ["scan is empty"]),
        ([], ["no cases"]),
    ],
)
def test_refuses_a_bad_line_in_one_line_of_its_own(case_list, lines, words):
    with pytest.raises(InputError) as caught:
        datasets.read_cases(case_list(*lines))
    message = str(caught.value)
    assert "cases.csv" in message
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_bad_lines_are_gathered_where_the_others_are_wanted(case_list):
    path = case_list("a,p1,train,cap,a.nii.gz,,", "b,p2,train,influenza,b.nii.gz,,")
    failures: list[str] = []
    assert [case.name for case in datasets.read_cases(path, failures=failures)] == ["a"]
    (line,) = failures
    assert "line 3: b: label 'influenza' is unknown, expected one of" in line
    assert line.endswith("mend it, or drop the case with --exclude=b")
    assert [case.name for case in datasets.read_cases(path, exclude=["b"])] == ["a"]


def test_refuses_missing_files_unless_told_not_to_look(case_list):
    path = case_list("a,p1,train,cap,a.nii.gz,m.nii.gz,", make_files=False)
    with pytest.raises(InputError, match=r"a: .*a\.nii\.gz does not exist.*--exclude=a.*1 more"):
        datasets.read_cases(path)
    assert len(datasets.read_cases(path, check_files=False)) == 1


def test_excluded_cases_are_left_out_and_must_exist(case_list):
    path = case_list("a,p1,train,cap,a.nii.gz,,", "b,p1,test,cap,b.nii.gz,,")
    assert [case.name for case in datasets.read_cases(path, exclude=["b"])] == ["a"]
    with pytest.raises(InputError, match="--exclude=c: no such case"):
        datasets.read_cases(path, exclude=["c"])


def test_refuses_files_that_are_no_case_list(tmp_path):
    with pytest.raises(InputError, match="no such case list"):
        datasets.read_cases(tmp_path / "absent.csv")
    (tmp_path / "a.csv").write_text("case,scan\na,a.nii.gz\n")
    with pytest.raises(InputError, match="no column patient, split, label, lesion_mask, lung_mask"):
        datasets.read_cases(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(InputError, match="save it as UTF-8"):
        datasets.read_cases(tmp_path / "b.csv")
