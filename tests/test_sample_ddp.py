"""sample_ddp.py in one process: what is made, resuming, refusals, faults, messages."""

import errno
import json
import os
import re
import shutil
import signal
import time
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from commands import code as code_of
from PIL import Image
from toy import save_tiny

import profiles
import sample_ddp
from adacorr.command import Failure
from diffusion import DDIM
from fid_run import images, job, record, worker
from fid_run.labels import make_labels
from pipeline import Pipeline
from ranks import Ranks

STEPS = 12


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny.safetensors")


class Call(NamedTuple):
    """How a call of sample_ddp.main ended, and the folder of its run if there is one."""

    code: int
    folder: Path | None
    out: str
    err: str

    def error(self, code):
        """The text of a single line of error, with this exit code."""
        assert self.code == code, self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("sample_ddp.py: error: ")
        return self.err


@pytest.fixture
def ddp(checkpoint, tmp_path, capsys, monkeypatch):
    """Calls sample_ddp.main on the tiny model."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, count=7, where=None, ckpt=checkpoint):
        where = tmp_path / "out" if where is None else where
        fixed = "--ckpt", ckpt, f"--num-sampling-steps {STEPS} --device cpu --sample-dir", where
        code = code_of(sample_ddp.main, *fixed, f"--num-fid-samples {count}", *argv)
        printed = capsys.readouterr()
        folders = [path for path in where.iterdir() if path.is_dir()] if where.is_dir() else []
        return Call(code, folders[0] if len(folders) == 1 else None, printed.out, printed.err)

    return call


def contents(folder):
    """Name -> bytes of all images of a run folder."""
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def outcomes(folder):
    return [session.get("outcome") for session in run_json(folder)["sessions"]]


def npz(folder):
    return folder.with_name(f"{folder.name}.npz")


def packed_arrays(folder):
    with np.load(npz(folder)) as packed:
        return dict(packed)


def sampled_batches(monkeypatch, most=99, error=KeyboardInterrupt):
    """The batches that are sampled from now on; the run breaks before it samples more than so many."""
    batch, calls = worker.Sampling.batch, []

    def breaking(self, indices):
        if len(calls) == most:
            raise error
        calls.append(indices.tolist())
        return batch(self, indices)

    monkeypatch.setattr(worker.Sampling, "batch", breaking)
    return calls


# ------------------------------------------------------------------------------------------- what is made


def test_images_are_those_of_each_index_alone(ddp, checkpoint):
    code, folder, _, err = ddp("--adacorr --global-seed 3 --per-proc-batch-size 4")
    assert (code, err) == (0, "")
    args = sample_ddp.parse(["--ckpt", str(checkpoint), "--num-sampling-steps", str(STEPS), "--adacorr"])
    pipe, cache = job.load(args)
    cache = profiles.with_profile(cache, pipe)
    labels, found = make_labels("random", 3, 7, 4), packed_arrays(folder)
    assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (7, 8, 8, 3))
    assert found["arr_1"].tolist() == labels.tolist()
    for i in range(7):
        x = pipe.sample(3, np.array([i]), torch.from_numpy(labels[i : i + 1]), cache)
        with Image.open(folder / "images" / f"{i:06d}.png") as picture:
            assert np.array_equal(picture, pipe.decode(x)[0].numpy())
        assert np.array_equal(found["arr_0"][i], pipe.decode(x)[0].numpy())


def test_what_is_recorded_and_said(ddp):
    code, folder, out, _ = ddp("--adacorr gamma=0.5 --labels balanced", count=8)
    assert code == 0
    assert folder.name == "DiT-2x32-2-tiny-8px-ddim-12steps-cfg1.5-adacorr-gamma=0.5-seed0-balanced"
    content = run_json(folder)
    (session,), totals = content["sessions"], content["statistics"]
    assert content["protocol"]["sampler"] == {"spec": "ddim", "steps": STEPS}
    assert content["protocol"]["cache"]["correction"]["gamma"] == 0.5
    assert (session["outcome"], session["count"], session["missing"], session["images"]) == ("complete", 8, 8, 8)
    assert (totals["images"], totals["made_again"]) == (8, [])
    assert 0 < totals["compute"] < 1
    assert 0 < totals["hit_rate"] < 1
    assert totals["saved_flops"] > 0
    assert totals["images_per_second"] == pytest.approx(8 / session["seconds"])
    assert (content["npz"]["count"], content["npz"]["bytes"]) == (8, npz(folder).stat().st_size)
    for words in (f"sha256 {content['npz']['sha256']}", "images/s", "hit_rate", '"gamma":0.5', "8 to make"):
        assert words in out
    with zipfile.ZipFile(npz(folder)) as archive:
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert archive.testzip() is None


def test_the_folder_is_named_after_the_protocol(ddp, tmp_path):
    """By name, so that runs of other steps, guidance, seed or cache do not meet in one folder."""
    expected = {
        "--num-sampling-steps 5": "ddim-5steps-cfg1.5-uncached-seed0",
        "--cache interval:every=4 --adacorr gamma=2 --seed 5": "cfg1.5-interval-every=4+adacorr-gamma=2-seed5",
        "--sampler ddpm --cfg-scale 4 --dtype bf16": "ddpm-12steps-cfg4-uncached-seed0-bf16",
    }
    for flags, part in expected.items():
        before = {*(tmp_path / "out").glob("*")}
        assert ddp(flags, "--no-pack", count=1).code == 0
        (made,) = {*(tmp_path / "out").glob("*")} - before
        assert part in made.name
        assert re.fullmatch(r"[A-Za-z0-9._=+-]+", made.name)


@pytest.mark.parametrize("flags", ["--adacorr", "--cache teacache:profile=none --adacorr", "--sampler ddpm"])
def test_bytes_do_not_depend_on_the_batch_size(ddp, tmp_path, flags):
    one, many = (ddp(flags, f"--per-proc-batch-size {n}", count=4, where=tmp_path / str(n)).folder for n in (1, 3))
    assert contents(one) == contents(many)
    assert len(contents(one)) == 4
    assert npz(one).read_bytes() == npz(many).read_bytes()


def test_without_determinism_a_batch_is_sampled_at_once(ddp, monkeypatch, tmp_path):
    sizes, sample = [], Pipeline.sample

    def noting(self, seed, indices, *rest, **more):
        sizes.append(len(indices))
        return sample(self, seed, indices, *rest, **more)

    monkeypatch.setattr(Pipeline, "sample", noting)
    code, loose, _, _ = ddp("--no-deterministic --per-proc-batch-size 4")
    assert (code, sizes) == (0, [4, 3])
    code, strict, _, _ = ddp("--per-proc-batch-size 4", where=tmp_path / "strict")
    assert (code, sizes[2:]) == (0, [1] * 7)
    assert np.abs(packed_arrays(loose)["arr_0"].astype(int) - packed_arrays(strict)["arr_0"]).max() <= 1


def test_a_latent_model_goes_through_its_vae(ddp, tmp_path):
    import diffusers

    path = save_tiny(tmp_path / "latent.safetensors", input_size=4, in_channels=4)
    options = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4}
    options |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4, "latent_channels": 4}
    vae, place = diffusers.AutoencoderKL(**options), tmp_path / "small vae"
    vae.save_pretrained(place)
    flags = "--sampler ddpm --adacorr --vae", place
    code, folder, _, _ = ddp(*flags, "--image-size 32", count=2, ckpt=path)
    assert code == 0
    assert "32px-vae-small-vae-ddpm-12steps" in folder.name
    assert packed_arrays(folder)["arr_0"].shape == (2, 32, 32, 3)
    before = run_json(folder)["protocol"]["vae"]
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(place)
    assert f'vae.sha256: "{before["sha256"]}" in the folder' in ddp(*flags, count=2, ckpt=path).error(2)
    vae.register_to_config(scaling_factor=0.13)
    vae.save_pretrained(place)
    assert "by 0.13: give one that scales by 0.18215" in ddp(*flags, count=2, ckpt=path).error(2)
    assert "4 channels, which are no RGB image" in ddp("--vae none", count=2, ckpt=path).error(2)


def test_an_unconditional_model_has_no_labels(ddp, tmp_path):
    path = save_tiny(tmp_path / "free.safetensors", num_classes=0)
    code, folder, _, _ = ddp("--cfg-scale 1", count=2, ckpt=path)
    assert code == 0
    assert [*packed_arrays(folder)] == ["arr_0"]


# --------------------------------------------------------------------------------------------- resuming


def test_an_interrupted_run_goes_on_with_other_batches_and_gives_the_same_bytes(ddp, monkeypatch, tmp_path):
    whole = ddp("--adacorr", where=tmp_path / "whole").folder
    with monkeypatch.context() as patch:
        sampled_batches(patch, 2)
        code, folder, _, _ = ddp("--adacorr --per-proc-batch-size 1")
    assert (code, outcomes(folder)) == (130, ["KeyboardInterrupt"])
    assert not npz(folder).exists()
    kept = contents(folder)
    calls = sampled_batches(monkeypatch)
    code, folder, out, _ = ddp("--adacorr --per-proc-batch-size 5")
    assert (code, calls) == (0, [[2], [3], [4], [5], [6]])
    assert "2 of 7 are there, 5 to make" in out
    assert kept.items() <= contents(folder).items()
    assert contents(folder) == contents(whole)
    assert npz(folder).read_bytes() == npz(whole).read_bytes()
    assert outcomes(folder) == ["KeyboardInterrupt", "complete"]
    assert [session["images"] for session in run_json(folder)["sessions"]] == [2, 5]
    assert run_json(folder)["statistics"]["images"] == 7


def test_more_images_are_added_to_those_that_are_there(ddp, monkeypatch, tmp_path):
    folder = ddp("--no-pack", count=3).folder
    first, content = contents(folder), run_json(folder)
    assert not npz(folder).exists()
    content["sessions"][-1]["environment"]["torch"] = "1.13"
    (folder / "run.json").write_text(json.dumps(content))
    calls = sampled_batches(monkeypatch)
    code, folder, out, _ = ddp()
    assert (code, calls) == (0, [[3], [4], [5], [6]])
    assert f"torch was 1.13 in the session before and is {torch.__version__} now" in out
    assert out.count("in the session before") == 1
    assert first.items() < contents(folder).items()
    other = ddp(where=tmp_path / "at once").folder
    assert contents(folder) == contents(other)
    assert npz(folder).read_bytes() == npz(other).read_bytes()
    calls.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert "complete" in ddp().out  # and left alone
    code, _, _, err = ddp(count=2)  # fewer: nothing to make, and the .npz holds two
    assert (code, calls) == (0, [])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    assert "holds 7 images and will be packed anew with the first 2" in err
    assert len(packed_arrays(folder)["arr_0"]) == 2


def test_damaged_removed_and_foreign_images_are_made_again(ddp, monkeypatch, tmp_path):
    folder, other = ddp().folder, ddp("--seed 1", where=tmp_path / "other").folder
    whole, packed = contents(folder), npz(folder).read_bytes()
    cut, empty, foreign, gone, flipped = [folder / "images" / name for name in sorted(whole)][:5]
    cut.write_bytes(cut.read_bytes()[:-20])
    empty.write_bytes(b"")
    foreign.write_bytes((other / "images" / foreign.name).read_bytes())
    gone.unlink()
    (folder / "images" / "holiday.png").write_bytes(b"hello")
    calls = sampled_batches(monkeypatch)
    code, _, out, _ = ddp()
    assert (code, calls) == (0, [[0], [1], [2], [3]])
    for path in (cut, empty, foreign):
        assert f"made again: {path}: " in out
    assert contents(folder) == whole | {"holiday.png": b"hello"}
    assert npz(folder).read_bytes() == packed
    data = bytearray(flipped.read_bytes())
    data[data.index(b"IDAT") + 30] ^= 1
    flipped.write_bytes(data)
    assert "complete" in ddp().out  # nobody reads it all without being asked
    npz(folder).unlink()
    assert re.search(f"{flipped}: .* --verify", ddp().error(1))
    assert not npz(folder).exists()
    calls.clear()
    assert ddp("--verify").code == 0
    assert calls == [[4]]
    assert npz(folder).read_bytes() == packed


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--cfg-channels 3", 'guidance.channels: "all" in the folder, "3" asked'),
        ("--no-deterministic", "precision.deterministic: true in the folder, false asked"),
        ("another checkpoint", "checkpoint.sha256"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(ddp, checkpoint, tmp_path, flags, field):
    """--overwrite deletes the old run, and nothing else."""
    folder = ddp(count=3).folder
    (folder / "notes.txt").write_text("mine")
    before, options = contents(folder), {"count": 2}
    if flags == "another checkpoint":
        flags, options["ckpt"] = "", save_tiny(tmp_path / "other" / checkpoint.name, seed=2)
    said = ddp(flags, **options).error(2)
    assert field in said
    assert "--overwrite" in said
    assert contents(folder) == before
    assert ddp(flags, "--overwrite", **options).code == 0
    assert len(contents(folder)) == 2
    assert outcomes(folder) == ["complete"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_two_jobs_in_one_folder(ddp, monkeypatch):
    folder = ddp(count=1).folder
    monkeypatch.setattr(record, "WAIT", 0.2)
    with record.RunFolder(folder).lock(print):
        second = ddp(count=2)
    assert f"pid {os.getpid()}" in second.error(2)
    assert "waiting for up to 0 s" in second.out
    assert ddp(count=2).code == 0


def test_a_job_that_was_here_while_this_one_waited_for_the_lock_keeps_its_images(ddp, monkeypatch, tmp_path):
    other = ddp("--cfg-channels 3", where=tmp_path / "other").folder
    lock, place = record.RunFolder.lock, tmp_path / "out" / other.name

    @contextmanager
    def waiting(self, note):
        with lock(self, note):
            shutil.copytree(other, place, dirs_exist_ok=True)
            yield

    monkeypatch.setattr(record.RunFolder, "lock", waiting)
    assert 'guidance.channels: "3" in the folder, "all" asked' in ddp().error(2)
    assert contents(place) == contents(other)


def test_a_folder_that_is_deleted_in_mid_run_is_named_and_not_made_again(ddp, monkeypatch):
    batch = worker.Sampling.batch

    def deleting(self, indices):
        if indices[0] == 3:
            (folder,) = Path.cwd().glob("out/*")
            while not (folder / "images" / "000002.png").exists():  # the writer is a batch behind
                time.sleep(0.01)
            shutil.rmtree(folder)
        return batch(self, indices)

    monkeypatch.setattr(worker.Sampling, "batch", deleting)
    assert "was deleted, or its record changed, while the job was at work" in ddp().error(1)
    assert not list(Path.cwd().glob("out/*/images"))


def test_a_label_file_is_taken_line_by_line_and_held_to(ddp, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("3\n0\n2\n")
    code, folder, _, err = ddp("--labels", path, count=3)
    assert (code, err) == (0, "")
    assert packed_arrays(folder)["arr_1"].tolist() == [3, 0, 2]
    for changed, words in (("3\n0\n1\n", "labels:"), ("0\n4\n1\n", "line 2: 4 is outside 0..3")):
        path.write_text(changed)
        assert words in ddp("--labels", path, count=3).error(2)


def test_a_folder_that_cannot_be_written(ddp, monkeypatch):
    """By the lock, which is a file in it: os.access says yes to root even where the server says no."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system", "out/NAME/lock-000")

    monkeypatch.setattr(record.FileLock, "acquire", refuse)
    assert "Read-only file system: 'out/NAME/lock-000'" in ddp().error(2)


def test_a_checkpoint_that_cannot_be_used_leaves_no_folder(ddp, checkpoint, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-1000])
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")  # a pickle that would run code
    faults = {
        "--num-classes 1000": "is for 4 classes, --num-classes 1000 was asked",
        "--vae nowhere": "no VAE 'nowhere'",
        "--ckpt cut.safetensors": "corrupt or incomplete",
        "--ckpt code.pt": "is refused",
    }
    for flags, message in faults.items():
        call = ddp(flags)
        assert message in call.error(2)
        assert call.folder is None


# ----------------------------------------------------------------------------------------------- faults


def test_a_full_disk(ddp, monkeypatch):
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(str(target).endswith(".png"))
        if calls[-1] and sum(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        call = ddp()
    found = r"\d{6}\.png: the disk, its inodes or the quota are used up: \d+ bytes needed, \d+ free; finished"
    assert re.search(found, call.error(1))
    folder = call.folder
    assert sorted(contents(folder)) == ["000000.png", "000001.png", "000002.png"]
    assert "used up" in outcomes(folder)[0]
    assert ddp().code == 0
    assert len(packed_arrays(folder)["arr_0"]) == 7


@pytest.mark.parametrize(
    ("number", "flags", "finished"),
    [(signal.SIGTERM, "", 3), (signal.SIGUSR1, "", 3), (signal.SIGINT, "--no-deterministic", 2)],
)
def test_a_signal_drops_the_batch_that_is_open_and_nothing_else(ddp, monkeypatch, tmp_path, number, flags, finished):
    flags += " --per-proc-batch-size 2"
    whole = ddp(flags, where=tmp_path / "whole").folder
    with monkeypatch.context() as patch:
        step, calls = DDIM.step, []

        def signalling(self, i, x, *rest):
            calls.append(i)
            if len(calls) == finished // len(x) * STEPS + 4:
                os.kill(os.getpid(), number)
            return step(self, i, x, *rest)

        patch.setattr(DDIM, "step", signalling)
        code, folder, _, err = ddp(flags)
    assert code == (130 if number == signal.SIGINT else 75)
    assert "goes on from here" in err
    assert len(contents(folder)) == finished
    assert len(calls) % STEPS == 4
    assert "stopped by" in outcomes(folder)[0]
    assert ddp(flags).code == 0
    assert (contents(folder) == contents(whole)) or "no-deterministic" in flags
    assert packed_arrays(folder)["arr_1"].tolist() == packed_arrays(whole)["arr_1"].tolist()


def test_a_signal_while_the_last_batch_is_written(ddp, monkeypatch):
    with monkeypatch.context() as patch:
        write, calls = images.Store.write, []

        def signalling(self, index, *rest):
            calls.append(index)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # until the main thread is told
            write(self, index, *rest)

        patch.setattr(images.Store, "write", signalling)
        code, folder, _, _ = ddp("--per-proc-batch-size 2")
    assert (code, outcomes(folder), len(contents(folder))) == (75, ["stopped by SIGTERM"], 7)
    assert ddp().code == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA"), ["--per-proc-batch-size 2", "--cache-dtype bf16 or int8", "the cache held"]),
        (Failure("image 2 stays undefined"), ["image 2 stays undefined"]),
    ],
    ids=["memory", "undefined"],
)
def test_a_failure_in_sampling_keeps_what_was_finished(ddp, monkeypatch, error, words):
    sampled_batches(monkeypatch, 1, error)
    call = ddp("--adacorr --no-deterministic --per-proc-batch-size 2")
    assert all(word in call.error(1) and word in outcomes(call.folder)[0] for word in words)
    assert sorted(contents(call.folder)) == ["000000.png", "000001.png"]


def test_an_error_in_finishing_is_a_failure(ddp, monkeypatch):
    """Whatever goes wrong once images are being made ends with 1: 2 would say that nothing was sampled."""
    with monkeypatch.context() as patch:
        patch.setattr(job, "pack", lambda *_: (_ for _ in ()).throw(OSError("the server is gone")))
        call = ddp()
    assert "the server is gone" in call.error(1)
    assert len(contents(call.folder)) == 7
    assert ddp().code == 0


# ------------------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("name", ["dit-xl-2-256-ddpm-250", "dit-xl-2-512-ddpm-250", "dit-xl-2-256-ddim-50"])
def test_presets(name):
    args = sample_ddp.parse(["--preset", name])
    assert f"dit-xl-2-{args.image_size}-{args.sampler}-{args.num_sampling_steps}" == name
    assert (args.model, args.vae, args.cfg_scale, args.cfg_channels) == ("DiT-XL/2", "ema", 1.5, "3")
    assert (args.num_fid_samples, args.labels, args.seed) == (50_000, "random", 0)
    args = sample_ddp.parse(["--cfg-scale", "4", "--preset", name])  # flags win, also those before it
    assert (args.cfg_scale, args.sampler) == (4, name.split("-")[4])


def test_the_flags_of_the_release_are_known():
    release = "--model DiT-XL/2 --vae ema --sample-dir x --per-proc-batch-size 4 --num-fid-samples 9 --image-size 256"
    release += " --num-classes 1000 --cfg-scale 1.5 --num-sampling-steps 250 --global-seed 3 --no-tf32 --ckpt y"
    args = sample_ddp.parse(release.split())
    assert (args.seed, args.tf32, args.num_fid_samples, args.per_proc_batch_size) == (3, False, 9, 4)
    default = sample_ddp.parse([])
    assert (default.num_fid_samples, default.per_proc_batch_size, default.tf32) == (50_000, 32, True)
    assert (default.ckpt, default.model) == (None, None)  # the bundled checkpoint


def test_a_restart_by_torchrun_overwrites_nothing(ddp, monkeypatch):
    """The processes have the arguments of the first start, --overwrite among them."""
    folder = ddp(count=3).folder
    (folder / "images" / "000001.png").unlink()
    before = contents(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, _, out, _ = ddp("--overwrite", count=3)
    assert code == 0
    assert "--overwrite was for the first start" in out
    assert "2 of 3 are there" in out
    assert contents(folder).items() >= before.items()


def test_a_process_with_another_checkpoint_says_so(tmp_path, monkeypatch):
    """As on a node whose file of that name is an older one."""
    path = save_tiny(tmp_path / "own.safetensors")
    argv = ["--ckpt", str(path), "--device", "cpu", "--num-sampling-steps", "2", "--num-fid-samples", "2"]
    with ExitStack() as stack:
        made, _, _ = job.prepare(sample_ddp.parse([*argv, "--sample-dir", str(tmp_path)]), Ranks(), stack)
        for name, answer in {"open": None, "from_leader": made, "barrier": None, "close": None}.items():
            monkeypatch.setattr(Ranks, name, lambda *_, given=answer: given)
        save_tiny(path, seed=2)
        with pytest.raises(ValueError, match="process 1 loads other files than process 0: checkpoint.sha256: "):
            job.run(None, Ranks(1, 2, 1, 2))


def test_files_of_a_method_are_part_of_the_protocol(ddp, tmp_path):
    routers = tmp_path / "r.pt"
    found = []
    for on in (False, True):
        logits = torch.full((4,), 9.0 if on else -9.0)
        torch.save({"routers": {f"{i}.prob": logits for i in range(STEPS)}}, routers)
        code, folder, _, err = ddp("--cache", f"l2c:router={routers}", "--overwrite", count=1)
        assert code == 0, err
        found.append(run_json(folder)["run_id"])
    assert found[0] != found[1]
