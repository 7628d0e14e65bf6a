import shutil
from pathlib import Path

from pipelines.training.loggers import MetricsCSV, make_loggers


def test_a_resumed_log_goes_on_and_drops_the_life_that_was_cut_short(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        first.log_metrics({"loss": step / 10, "epoch": 0}, step)
    first.log_metrics({"val": 0.5}, 2)
    second = MetricsCSV(tmp_path / "metrics.csv")
    second.log_metrics({"loss": 9.0}, 3)
    second.log_metrics({"loss": 10.0}, 4)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,val\n1,0.1,\n2,0.2,0.5\n3,9,\n4,10,\n"


def test_a_stage_keeps_its_wandb_run_wherever_its_folder_goes(tmp_path: Path) -> None:
    def begun(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        return tmp_path / name

    def run_of(folder: Path) -> object:
        return make_loggers("wandb", folder)[1].version

    first = run_of(begun("here"))
    assert run_of(tmp_path / "here") == first
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)  # another time stamp
    shutil.rmtree(tmp_path / "here")
    assert run_of(tmp_path / "there") == first
    assert run_of(begun("here")) != first  # made again
