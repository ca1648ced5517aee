"""A mistake on any command line: exit code 2 and one line, before weights are read and before a file is written."""

import sys

import pytest
from commands import code, one_line

import calibrate
import evaluate.__main__
import evaluate.train_features
import pipeline
import sample
import sample_ddp
import train
from benchmarks import tables

MAINS = {
    "sample.py": sample.main,
    "sample_ddp.py": sample_ddp.main,
    "train.py": train.main,
    "calibrate.py": calibrate.main,
    "evaluate": evaluate.__main__.main,
    "evaluate.train_features": evaluate.train_features.main,
    "benchmarks.tables": tables.main,
}
# Script and flags of a valid command, and for each mistake what is added and a part of what is said. Those of the
# options of model, sampler and cache, which all share, are tried on sample.py.
CASES = {
    "sample.py": {
        "--num-sampling-steps 0": "--num-sampling-steps 0 is outside 1..1000",
        "--num-sampling-steps 1001": "--num-sampling-steps 1001",
        "--num-sampling-steps ten": "--num-sampling-steps: invalid int value: 'ten'",
        "--cfg-scale nan": "--cfg-scale nan is outside 0.0..100.0",
        "--cfg-scale -1": "--cfg-scale -1.0 is outside",
        "--sampler dimm": "did you mean ddim?",
        "--model DiT-M/2": "invalid choice: 'DiT-M/2'",
        "--model DiT-S/2": "no released weights for DiT-S/2",
        "--model DiT-XL/2 --image-size 250": "no released weights for DiT-XL/2 at 250 px",
        "--ckpt=": "--ckpt is empty",
        "--seed -1": "-1 is outside 0..",
        "--seed one": "'one' is no whole number",
        "--device meta": "--device meta cannot be used",
        "--device tpu": "--device tpu cannot be used",
        "--cache teacash": "did you mean teacache?",
        "--cache teacache:profile=nowhere.json": "nowhere.json",
        "--adacorr gama=1": "did you mean gamma?",
        "--adacorr gamma=inf": "gamma=inf",
        "--adacorr lambda=-1": "lambda=-1",
        "--adacorr budget=8,gamma=2": "budget=8",
        "--adacorr literal --cache interval": "literal",
        "--adacorr literal --cache-dtype bf16": "(--cache-dtype) has no effect on literal",
        "--cache freqca --cache-dtype int8": "(--cache-dtype) has no effect on freqca",
        "--calibrate maybe": "--calibrate maybe: give auto, off, a number of images",
        "--calibrate 0": "--calibrate 0 is outside 1..1000",
        "--calibrate x.txt": "--calibrate x.txt",
        "--adacorr --calibrate x.json": "profile x.json is no file: make one with",
        "--calibrate 8": "--calibrate 8 has no effect on a run without a cache",
        "--cache interval --calibrate 8": "has no effect on interval",
        "--adacorr literal --calibrate 8": "--calibrate 8 has no effect on literal",
        "--adacorr order=1 --calibrate 8": "--calibrate 8 has no effect on adacorr:order=1",
        "--adacor": "unrecognized arguments: --adacor",
        "--compare": "--compare needs a cache",
        "--class-labels 0,cat": "--class-labels: 'cat' is not a whole number",
        "--repeats 0": "--repeats: 0 is outside 1..1000",
        "--repeats 2": "--repeats 2 has no effect without --compare",
        "--cache-dtype bf16": "--cache-dtype bf16 has no effect without --cache",
        "--num-images 0": "--num-images: 0 is outside",
        "--out x.png --record x.png": "--record x.png is the file of --out",
        "--out picture.jpg": "--out picture.jpg does not end in .png",
        "--out file/x.png": "file is a file, not a folder",
        "--record folder": "--record: the file folder is a folder",
        "--out locked/x.png": "is not writable",
    },
    "sample_ddp.py --sample-dir out": {
        "--num-fid-samples 0": "--num-fid-samples: 0 is outside 1..10000000",
        "--num-fid-sample 3": "unrecognized arguments",
        "--per-proc-batch-size 0": "--per-proc-batch-size: 0 is outside 1..100000",
        "--cfg-scale nan": "--cfg-scale nan is outside",
        "--threads 0": "--threads: 0 is outside",
        "--calibrate 8": "--calibrate 8 has no effect on a run without a cache",
        "--preset best": "invalid choice: 'best'",
        "--labels nothing.txt": "--labels nothing.txt is neither random nor balanced nor a text file",
        "--labels labels.txt --num-fid-samples 3": "2 labels, but 3 images need one each",
        "--device meta": "--device meta cannot be used",
        "--sample-dir file": "is a file or a link to nowhere, not a folder",
        "--sample-dir link": "is a file or a link to nowhere, not a folder",
        "--sample-dir file/inner": "is a file, not a folder",
    },
    "train.py --data nothing --out run": {
        "": "nothing does not exist",
        "--data folder": "page.md holds no .png",
        "--data file": "file is neither a folder of images nor a whole .npz",
        "--lr nan": "--lr: nan is outside",
        "--batch-size 0": "--batch-size: 0 is outside 1..",
        "--steps 5 --warmup-steps 5": "--warmup-steps 5 is outside 0..4",
        "--label-dropout 1.5": "--label-dropout: 1.5 is outside 0.0..1.0",
        "--model DiT-Z/2": "invalid choice: 'DiT-Z/2'",
        "--model DiT-S/4 --image-size 30": "--image-size 30 is no multiple of 4",
        "--device cuda:99": "--device cuda:99 cannot be used",
        "--step 5": "unrecognized arguments: --step",
        "--out file/run": "is a file, not a folder",
    },
    "calibrate.py --cache teacache --out p.json": {
        "--cache teacash": "did you mean teacache?",
        "--cache interval": "are measured on a model",  # there is one of that name, without a calibration
        "--cache teacache:threshold=0.1": "did you mean teacache?",
        "--out p.npz": "must end in .json or .safetensors",
        "--out file/p.json": "is a file, not a folder",
        "--num-images 0": "--num-images: 0",
        "--batch-size 0": "--batch-size: 0",
        "--seed 2147483648": "--seed 2147483648",
    },
    "evaluate": {"": "COMMAND", "fidd": "invalid choice: 'fidd'"},
    "evaluate compare --methods interval --out x": {
        "--methods intervall": "did you mean interval?",
        "--methods never": "--methods: 'never'",  # a method without a knob cannot be swept
        "--levels 0.5,2": "--levels: '2'",
        "--num-images 0": "--num-images: 0",
        "--num-images many": "--num-images: 'many' is no whole number",
        "--solution-steps 1001": "--solution-steps: 1001",
        "--num-images 4 --search-images 5": "--search-images 5 is outside 1..4",
        "--num-sampling-steps 1": "--num-sampling-steps 1 is outside 2..1000",
        "--calibrate some": "--calibrate some",
        "--out file/x": "is a file, not a folder",
        "--out folder/page": "page.md is a folder",
        "--out locked/x": "is not writable",
        "--plot": "--plot needs matplotlib",
    },
    "evaluate table1": {
        "--methods intervall": "did you mean interval",
        "--methods teacache:threshold=0.2,interval": "'interval'",
        "--gammas 1": "unrecognized arguments",
        "--num-images 1": "--num-images: 1",
        "--batch-size 0": "--batch-size: 0",
        "--repeats -1": "--repeats: -1",
        "--num-sampling-steps 5": "--num-sampling-steps 5",
        "--cfg-scale nan": "--cfg-scale nan",
        "--calibrate some": "--calibrate some",
    },
    "evaluate table2": {"--cache dimm": "dimm"},
    "evaluate table4": {"--gammas 1,x": "--gammas: 'x' is no number", "--lambdas=-1": "--lambdas: -1.0 is outside"},
    "evaluate figure2": {
        "": "--out",
        "--out x.json --steps 50": "--steps 50 is outside 0..49",
        "--out x.json --num-images 65": "--num-images: 65",
        "--out x.json --setting adacorr": "--setting",
        "--out x.png": "--out x.png: the picture takes this name",
    },
    "evaluate leaderboard docs/compare.json": {"--out x.png --plot": "--out x.png: the picture takes this name"},
    "evaluate figure5 --out x.json": {
        "--setting intervall": "did you mean interval",
        "--calibrate never": "--calibrate never",
        "--setting interval --calibrate 8": "has no effect on interval",
        "--num-images 8": "figure5 needs matplotlib",
    },
    "evaluate figure4 --from x.json --out x.png": {"": "figure4 needs matplotlib"},
    "evaluate motion": {
        "--frames 32 2": "--frames: 2 is outside 3",
        "--clips 0": "--clips: 0",
        "--settings intervall": "did you mean interval",
        "--sampler ddpm": "--sampler ddpm injects noise",
        "--calibrate never": "--calibrate never",
        "--settings interval literal --calibrate 8": "has no effect on interval, literal",
    },
    "evaluate theory": {
        "--gammas nan": "--gammas: nan is outside",
        "--num-sampling-steps 1": "is outside 2..1000",
        "--num-images 0": "--num-images: 0 is outside",
    },
    "evaluate drift": {
        "": "--adacorr",
        "--cache interval --calibrate 8": "has no effect on interval",
        "--adacorr --num-images 0": "--num-images: 0",
    },
    "evaluate cost": {
        "": "--adacorr",
        "--cache intervall": "did you mean interval",
        "--adacorr --repeats 0": "--repeats: 0 is outside 1..1000",
        "--adacorr --batch-size 4 0": "--batch-size: 0 is outside",
        "--adacorr --calibrate never": "--calibrate never",
        "--cache interval --calibrate 8": "has no effect on interval",
        "--random-weights DiT-S/2 --adacorr": "budget=8",
        "--random-weights DiT-S/2 --adacorr budget=8 --ckpt x.pt": "leave them out",
        "--random-weights DiT-S/2 --adacorr budget=8 --calibrate 4": "--calibrate 4",
    },
    "evaluate fid": {"x": "--reference", "none --reference x": "none does not exist"},
    "evaluate.train_features": {
        "": "required: --data",
        "--data none.npz --test x --out w.pt": "does not end in .safetensors",
        "--data none.npz --test x --out w.safetensors": "none.npz",
        "--data x --test x --out w.safetensors --device nowhere": "--device nowhere",
    },
    "benchmarks.tables gamma": {"--images 0": "--images: 0 is outside", "--sampler dimm": "dimm"},
}
FLAT = [(command, more, words) for command, cases in CASES.items() for more, words in cases.items()]


@pytest.mark.parametrize(("command", "more", "words"), FLAT, ids=[f"{command} {more}" for command, more, _ in FLAT])
def test_a_mistake_is_one_line_before_the_work(command, more, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *_, **__: pytest.fail("read a checkpoint"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "labels.txt").write_text("0\n1\n")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder" / "page.md").mkdir(parents=True)
    if "locked" in more:
        monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write anywhere
    if "matplotlib" in words:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = sorted(tmp_path.rglob("*"))
    script, *given = command.split()
    assert code(MAINS[script], *given, more) == 2
    one_line(capsys, words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", MAINS)
def test_help(script, capsys):
    assert code(MAINS[script], "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}")
