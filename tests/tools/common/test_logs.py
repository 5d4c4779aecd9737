"""Logs of other programs, in the lines they print, give the right numbers; one that cannot be read is reported in one line."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from tools.common.console import UsageError
from tools.common.logs.reader import read_log, read_logs

# Each sample is copied from the public issue or source named with it.
MEGATRON = """\
 [2024-04-06 02:59:36] iteration       43/     100 | consumed samples:         5504 | elapsed time per iteration (ms): 5444.9 | \
throughput per GPU (TFLOP/s/GPU): 239.8 | learning rate: 8.600000E-06 | global batch size:   128 | lm loss: 1.825991E+00 | \
load_balancing_loss: 1.019746E+00 | loss scale: 1.0 | grad norm: 1.426 | num zeros: 0.0 | number of skipped iterations:   0 | \
number of nan iterations:   0 |
 [2024-04-06 02:59:41] iteration       44/     100 | consumed samples:         5632 | elapsed time per iteration (ms): 5533.8 | \
throughput per GPU (TFLOP/s/GPU): 236.0 | learning rate: 8.800000E-06 | global batch size:   128 | lm loss: 1.875063E+00 | \
load_balancing_loss: 1.020033E+00 | loss scale: 1.0 | grad norm: 1.327 | num zeros: 0.0 | number of skipped iterations:   0 | \
number of nan iterations:   0 |
"""  # NVIDIA/Megatron-LM issue 756
NEOX = """\
[2023-07-25 21:03:17,269] [INFO] [timer.py:215:stop] epoch=0/micro_step=34/global_step=34, RunningAvgSamplesPerSec=7.8646, \
CurrSamplesPerSec=8.00912418308922, MemAllocated=59.65GB, MaxMemAllocated=63.31GB
 samples/sec: 7.799 | iteration       34/   10000 | elapsed time per iteration (ms): 4103.1 | learning rate: 2.111E-06 | \
approx flops per GPU: 112.9TFLOPS | lm_loss: 1.118665E+01 | number of skipped iterations:   0 | number of nan iterations:   0 |
time (ms) | forward: 659.86 | backward: 2164.69 | backward-backward: 2164.66 | optimizer: 1172.51 | batch generator: 0.83
[2023-07-25 21:03:21,037] [INFO] [logging.py:96:log_dist] [Rank 0] step=35, skipped=0, lr=[2.1731931451279077e-06], \
mom=[[0.9, 0.95]]
"""  # deepspeedai/DeepSpeed issue 3742
OLMO = """\
2024-08-06 09:59:26.181 intern-studio-160750:0  olmo.train:908  INFO    [step=1/739328,epoch=0]
    optim/total_grad_norm=231.7
    train/CrossEntropyLoss=12.18
    train/Perplexity=195,153
    throughput/total_tokens=1,048,576
    System/Peak GPU Memory (MB)=46,911
2024-08-06 10:00:05.520 intern-studio-160750:0  olmo.train:908  INFO    [step=2/739328,epoch=0]
    optim/total_grad_norm=0.0002
    train/CrossEntropyLoss=1.7872662283480167e-06
    train/Perplexity=1.000
"""  # allenai/OLMo issue 692
OLMO_CORE = """\
2026-08-08 12:00:01 INFO [olmo_core.train.trainer:734] Training for 2,000 steps
2026-08-08 12:01:00 INFO [olmo_core.train.callbacks.console_logger:68] [step=100/2000,epoch=0,eta=5h11m]
    train/CE loss=6.2341
    train/PPL=511.9
    optim/LR (group 0)=4.0E-04
    optim/total grad norm=0.8132
2026-08-08 12:03:10 INFO [olmo_core.train.trainer:1003] Saving checkpoint for step 100 to 's3://b/k'...
2026-08-08 12:03:44 INFO [olmo_core.train.callbacks.console_logger:68] [step=200/2000,epoch=0]
"""  # allenai/OLMo-core, src/olmo_core/train/callbacks/console_logger.py
TORCHTITAN = """\
[titan] 2026-02-24 19:46:17,508 - root - INFO - step:  4  loss:  7.62585  grad_norm: 26.6250  memory: 66.91GiB(37.51%)  \
tps: 10,050  tflops: 314.71  mfu: 13.99%
[titan] 2026-02-24 19:46:17,508 - root - INFO - step:  4  loss:  7.62585  grad_norm: 26.6250  memory: 66.91GiB(37.51%)  \
tps: 10,049  tflops: 314.68  mfu: 13.99%
[titan] 2026-02-24 19:46:19,145 - root - INFO - \x1b[31mstep:  5  \x1b[32mloss:  7.07623  \x1b[38;2;180;60;0mgrad_norm: 46.5000  \
\x1b[38;2;54;234;195mmemory: 66.91GiB(37.51%)  \x1b[34mtps: 10,007\x1b[39m
"""  # pytorch/torchtitan pull request 2389; the colours of torchtitan/tools/utils.py
LLMC = """\
step   61/74 | loss 3.208939 (+nanz)| norm 1.4800 (+nanz)| lr 3.00e-04 | 44.57 ms | -100.0% bf16 MFU | 91886 tok/s
step   62/74 | loss 3.464926 (+nanz)| norm 1.3662 (+nanz)| lr 3.00e-04 | 44.57 ms | -100.0% bf16 MFU | 91886 tok/s
"""  # karpathy/llm.c issue 796
LLMC_MAIN = "s:0 tel:10.986450\ns:0 trl:10.965596 lr:0.000001 norm:15.3721\ns:1 trl:10.814037 lr:0.000002 norm:15.2400\n"
DEEPSPEED = """\
steps: 190 loss: 5.6508 iter time (s): 0.940 samples/sec: 136.170
[2023-01-01 00:00:01,000] [INFO] [fused_optimizer.py:370:_update_scale] Reducing dynamic loss scale from 65536 to 32768
steps: 200 loss: 5.5508 lm loss: 5.5103 moe loss: 0.0405 iter time (s): 0.936 samples/sec: 136.706
"""  # deepspeed/runtime/pipe/engine.py: train_batch
MODDED = "step:0/1530 val_loss:10.8258 train_time:0ms step_avg:nanms\nstep:1/1530 train_loss:10.8258 train_time:31ms\n" + (
    "step:2/1530 train_loss:10.0719 train_time:62ms step_avg:nanms\n"
)
NANOGPT = "iter 340: loss 5.4983, time 33785.52ms, mfu 0.96%\niter 350: loss 5.4702, time 33798.82ms, mfu 0.96%\n"

TEXTS = {
    "Megatron": (MEGATRON, [43, 44], {"loss": [1.825991, 1.875063], "grad_norm": [1.426, 1.327], "lr": [8.6e-6, 8.8e-6]}),
    "Megatron's times": (MEGATRON, [43, 44], {"seconds": [5.4449, 5.5338], "loss_scale": [1.0, 1.0]}),
    "GPT-NeoX": (NEOX, [34], {"loss": [11.18665], "lr": [2.111e-6], "seconds": [4.1031]}),
    "OLMo ": (OLMO, [1, 2], {"loss": [12.18, 1.7872662283480167e-06], "grad_norm": [231.7, 0.0002]}),
    "OLMo-core": (OLMO_CORE, [100], {"loss": [6.2341], "grad_norm": [0.8132], "lr": [4e-4]}),
    "torchtitan": (TORCHTITAN, [4, 5], {"loss": [7.62585, 7.07623], "grad_norm": [26.625, 46.5]}),
    "llm.c": (LLMC, [61, 62], {"loss": [3.208939, 3.464926], "grad_norm": [1.48, 1.3662], "seconds": [0.04457, 0.04457]}),
    "llm.c main.log": (LLMC_MAIN, [0, 1], {"loss": [10.965596, 10.814037], "grad_norm": [15.3721, 15.24], "lr": [1e-6, 2e-6]}),
    "DeepSpeed": (DEEPSPEED, [190, 200], {"loss": [5.6508, 5.5508], "seconds": [0.94, 0.936], "loss_scale": [np.nan, 32768]}),
    "modded-nanogpt": (MODDED, [1, 2], {"loss": [10.8258, 10.0719]}),
    "nanoGPT": (NANOGPT, [340, 350], {"loss": [5.4983, 5.4702], "seconds": [33.78552, 33.79882]}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_log_gives_its_numbers(tmp_path, name):
    text, steps, columns = TEXTS[name]
    path = tmp_path / "train.log"
    path.write_text("a line before\n" + text)
    log = read_log(path)
    assert log.steps.tolist() == steps
    for column, values in columns.items():
        np.testing.assert_allclose(log.columns[column], values, rtol=1e-12)
    assert name.split(" ")[0].split("'")[0] in log.source


def line(step, loss, norm="0.500"):
    return (
        f" iteration {step:8d}/  100000 | consumed samples: 1 | elapsed time per iteration (ms): 100.0 | "
        f"learning rate: 1.0E-04 | lm loss: {loss} | loss scale: 1.0 | grad norm: {norm} | number of skipped iterations:   0 |\n"
    )


def test_a_restart_keeps_both_attempts_in_order_and_the_later_wins_in_the_end(tmp_path):
    path = tmp_path / "train.log"
    first = [line(step, f"{3 + step / 1000:.6E}") for step in range(1, 31)]
    second = [line(step, f"{2 + step / 1000:.6E}") for step in range(21, 41)]
    path.write_text("".join([*first, " > successfully loaded checkpoint from /ckpt at iteration 20\n", *second]))
    log = read_log(path)
    assert log.steps.tolist() == [*range(1, 31), *range(21, 41)] and log.resumes == (20,)
    final = log.final()
    assert final.steps.tolist() == [*range(1, 41)]
    np.testing.assert_allclose(final.columns["loss"], [*(3 + np.arange(1, 21) / 1000), *(2 + np.arange(21, 41) / 1000)])


def test_what_is_not_finite_is_told_from_what_is_missing(tmp_path):
    path = tmp_path / "train.log"
    skipped = line(3, "0").replace(" lm loss: 0 |", "")  # Megatron leaves out the loss of a skipped iteration
    path.write_text(line(1, "2.5E+00") + line(2, "nan", "nan") + skipped + line(4, "2.5E+00"))
    log = read_log(path)
    assert log.steps.tolist() == [1, 2, 4]
    assert np.isnan(log.columns["loss"]).tolist() == [False, True, False]
    assert log.columns["grad_norm"].tolist() == [0.5, np.inf, 0.5]


def test_a_step_printed_by_every_rank_counts_once(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("".join(line(step, "2.5E+00") for step in (1, 1, 1, 2, 2, 2)))
    assert read_log(path).steps.tolist() == [1, 2]


TABLES = {
    "plain": "step,loss\n1,3.5\n2,3.25\n",
    "carriage returns": "step,loss\r\n1,3.5\r\n2,3.25\r\n",
    "other names": "iteration,lm_loss,iteration_time\n1,3.5,\n2,3.25,0.5\n",
    "further columns": "epoch,text,global_step,train/loss\n0,a,1,3.5\n0,b,2,3.25\n",
    "a row that is being written": "step,loss,lr\n1,3.5,1\n2,3.25,1\n3,3\n",
    "rows without a loss": "step,loss,val_loss\n1,3.5,\n1,,3.0\n2,3.25,\n",
    "a step twice": "step,loss\n1,3.5\n2,9.0\n2,3.25\n",
    "W&B": '"Step","fancy-run-7 - train/loss","fancy-run-7 - train/loss__MIN","fancy-run-7 - train/loss__MAX"\n'
    '"1","3.5","3.5","3.5"\n"2","3.25","3.25","3.25"\n',
    "JSON lines": '{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.25}\n{"step": 3, "lo',
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_its_numbers(tmp_path, name, packed):
    path = tmp_path / ("log.csv.gz" if packed else "log.csv")
    path.write_bytes(gzip.compress(TABLES[name].encode()) if packed else TABLES[name].encode())
    log = read_log(path)
    assert (log.steps.tolist(), log.columns["loss"].tolist()) == ([1, 2], [3.5, 3.25])


def test_a_table_of_several_runs_is_read_as_several(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("file,step,loss\na,1,3.5\na,2,3.25\nb,1,4.5\n")
    assert [(log.name, len(log.steps)) for log in read_logs(path)] == [(f"{path}:a", 2), (f"{path}:b", 1)]


def test_a_run_directory_is_read_with_its_resumes(tmp_path):
    records = [
        {"step": 0, "val_loss": 9.0},
        {"step": 1, "loss": 3.5, "lr": 0.1},
        {"step": 2, "loss": "NaN", "grad_norm": "Infinity"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "logs").mkdir()
    attempts = [{"event": "start", "resumed_step": 0}, {"event": "end"}, {"event": "start", "resumed_step": 1}]
    (tmp_path / "logs" / "attempts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in attempts))
    log = read_log(tmp_path)
    assert (log.steps.tolist(), log.resumes) == ([1, 2], (1,))
    assert np.isnan(log.columns["loss"][1]) and np.isnan(log.columns["grad_norm"][0]) and np.isinf(log.columns["grad_norm"][1])


def test_tensorboard_events_are_read_and_a_restart_keeps_the_later(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    for wall_time, (step, loss) in enumerate([(1, 3.5), (2, 9.0), (3, 9.0), (2, 3.25)]):
        for tag, number in (("lm loss", loss), ("grad-norm", 0.5)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=number)])
            writer.add_event(Event(wall_time=wall_time, step=step, summary=summary))
    writer.close()
    for path in (tmp_path, next(tmp_path.iterdir())):
        log = read_log(path)
        assert log.steps.tolist()[:2] == [1, 2]
        assert log.columns["loss"].tolist()[:2] == [3.5, 3.25] and log.columns["grad_norm"][0] == 0.5


def test_megatron_lines_without_a_loss_count_where_it_was_not_finite(tmp_path):
    path = tmp_path / "train.log"
    lost = line(2, "", "nan").replace("lm loss:  | ", "")
    scaled = lost.replace("loss scale: 1.0", "loss scale: 65536.0").replace("skipped iterations:   0", "skipped iterations:   1")
    counted = scaled.replace(" |\n", " | number of nan iterations:   1 |\n")
    numbered = [text.replace(f"{2:8d}/", f"{step:8d}/") for step, text in enumerate((scaled, counted), start=3)]
    path.write_text("".join([line(1, "2.5E+00"), lost, *numbered, line(5, "2.5E+00")]))
    log = read_log(path)  # step 3 is an overflow that the loss scaler took care of
    assert log.steps.tolist() == [1, 2, 4, 5]
    assert np.isnan(log.columns["loss"]).tolist() == [False, True, True, False]
    path.write_text(lost + lost.replace(f"{2:8d}/", f"{3:8d}/"))
    assert np.isnan(read_log(path).columns["loss"]).all()  # not one line with a loss


TITAN = "{rank}[titan] 2025-05-28 21:13:37,816 - root - INFO - step: {step:2d}  loss: {loss:.4f}  memory: 36.90GiB  tps: 4\n"


@pytest.mark.parametrize("prefix", ["[rank{}]:", "[default{}]:", "[node-3:{}]:", "{}: "])
def test_ranks_in_one_log_are_one_run(tmp_path, prefix):
    """Two ranks, the second one or two lines ahead at times, restart from step 3; rank 7 alone has the loss."""
    path = tmp_path / "train.log"
    order = [(7, 1), (0, 1), (0, 2), (0, 3), (7, 2), (7, 3), (7, 4), (7, 5), (0, 4), (0, 5)]
    rows = [*order, *[(rank, step) for step in (4, 5, 6) for rank in (0, 7)]]
    texts = [
        TITAN.format(rank=prefix.format(rank), step=step, loss=(10 - step - at / 100) if rank == 7 else -1)
        for at, (rank, step) in enumerate(rows)
    ]
    path.write_text("".join(texts))
    log = read_log(path)
    assert log.steps.tolist() == [1, 2, 3, 4, 5, 4, 5, 6]
    assert log.columns["loss"].tolist() == [9.0, 7.96, 6.95, 5.94, 4.93, 5.89, 4.87, 3.85]


def test_lines_that_do_not_name_their_rank_are_told_by_their_numbers(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("".join(TITAN.format(rank="", step=s, loss=10 - s) for s in (1, 2, 3, 1, 2, 3, 4, 5, 4, 5)))
    assert read_log(path).steps.tolist() == [1, 2, 3, 4, 5]


def test_a_log_of_a_rank_without_the_loss_says_so(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("".join(TITAN.format(rank="[rank0]:", step=s, loss=-1) for s in (1, 2, 3)))
    with pytest.raises(UsageError, match="without the last pipeline stage"):
        read_log(path)


NANOTRON = (
    "[0434:0]:10/17/2025 16:31:56 [INFO|DP=0|PP=1|TP=0]: iteration: {step} / 600 | consumed_tokens: 85.8G | "
    "elapsed_time_per_iteration_ms: 11.5K | tokens_per_sec: 22.8K | global_batch_size: 64 | lm_loss: {loss} | lr: 1e-05 | "
    "model_tflops_per_gpu: 38.3 | hardware_tflops_per_gpu: 38.3 | grad_norm: 1.25K | cuda_memory_allocated: 90.9M\n"
)  # huggingface/nanotron issue 390 and pull request 23
NEMO = (
    "Training epoch 1, iteration {step}/149 | lr: 1e-05 | consumed_samples: 121 | global_batch_size: 1 | global_step: {step} | "
    "reduced_train_loss: {loss} | train_step_timing in s: 11.5 | val_loss: 4.106\n"
)  # NVIDIA/bionemo pull request 740
NEMO_BAR = (
    "\rEpoch 0:   1%|          | {step}/77225 [9:07:58<878:01:48, 41.36s/it, loss=3.1, v_num=, reduced_train_loss={loss}0, "
    "global_step={step}.0, consumed_samples=1.63e+6]"
)  # NVIDIA/NeMo-Framework-Launcher issue 55


@pytest.mark.parametrize("text", [NANOTRON, NEMO, NEMO_BAR], ids=["nanotron", "NeMo", "NeMo's bar"])
def test_lines_of_further_programs_give_their_numbers(tmp_path, text):
    path = tmp_path / "train.log"
    path.write_text("".join(text.format(step=step, loss=loss) for step, loss in [(1, 3.5), (2, 3.25), (3, "nan")]))
    log = read_log(path)
    assert log.steps.tolist() == [1, 2, 3]
    np.testing.assert_equal(log.columns["loss"], [3.5, 3.25, np.nan])
    if text == NANOTRON:
        assert (log.columns["grad_norm"][0], log.columns["seconds"][0]) == (1250.0, 11.5)


FACE = "{'loss': %s, 'grad_norm': 1.5, 'learning_rate': 1e-04, 'epoch': 0.01}"
STEPS_OF_FACE = {
    "no bar": ([FACE + "\n"] * 3, [1, 2, 3]),
    "text in quotes": ([FACE.replace("%s", "'%s'").replace("1.5", "'1.5'") + "\n"] * 3, [1, 2, 3]),
    "a bar that lags": ([f"  {n}/60" + FACE + "\n" for n in (0, 1, 2)], [1, 2, 3]),
    "every tenth": ([f"\r 5%|5  | {n}/60 [00:01<00:30, 1.2it/s]" + FACE + "\n" for n in (10, 20, 30)], [10, 20, 30]),
    "resumed, lagging": ([f"\r 5%|5  | {n}/600 [00:01<00:30]\n" + FACE + "\n" for n in (509, 520, 529)], [510, 520, 530]),
    "a restart": ([f"\r | {n}/60 [00:01<00:30]\n" + FACE + "\n" for n in (10, 20, 30, 20, 30)], [10, 20, 30, 20, 30]),
    "an evaluation": (
        ["\r | 10/60 [00:01<00:30]\n" + FACE + "\n", "\r | 7/8 [00:01<00:30]{'eval_loss': 9.0, 'epoch': 0.01}\n"]
        + [f"\r | {n}/60 [00:01<00:30]\n" + FACE + "\n" for n in (20, 30)],
        [10, 20, 30],
    ),
}


@pytest.mark.parametrize("name", STEPS_OF_FACE)
def test_hugging_face_lines_are_numbered_by_their_progress_bar(tmp_path, name):
    texts, steps = STEPS_OF_FACE[name]
    losses = iter(np.arange(3.5, 0, -0.25))
    path = tmp_path / "out.txt"
    path.write_text("".join(text.replace("%s", str(next(losses))) if "%s" in text else text for text in texts))
    log = read_log(path)
    assert log.steps.tolist() == steps
    assert log.columns["loss"].tolist() == [3.5 - 0.25 * i for i in range(len(steps))] and log.columns["grad_norm"][0] == 1.5


HISTORY = [{"step": 10, "loss": 3.5, "epoch": 0.1}, {"step": 10, "eval_loss": 9.0}, {"step": 20, "loss": 3.25}]
DOCUMENTS = {
    "trainer state": json.dumps({"best_metric": None, "global_step": 20, "log_history": HISTORY}, indent=2),
    "trainer state in one line": json.dumps({"global_step": 20, "log_history": HISTORY}),
    "a list": json.dumps(HISTORY),
    "a list over lines": json.dumps(HISTORY, indent=1),
    "lines with lists in them": "".join(json.dumps(row | {"groups": [{"lr": 1.0}]}) + "\n" for row in HISTORY),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress], ids=["plain", "gz", "xz", "bz2"])
def test_json_gives_its_numbers_however_it_is_packed(tmp_path, name, pack):
    path = tmp_path / "trainer_state.json"  # packed or not, its name does not say
    path.write_bytes(pack(DOCUMENTS[name].encode()))
    log = read_log(path)
    assert (log.steps.tolist(), log.columns["loss"].tolist()) == ([10, 20], [3.5, 3.25])
    if pack is bytes:
        assert read_log(tmp_path).steps.tolist() == [10, 20]  # a checkpoint's folder


COUNTERS = {
    "W&B's history": ",_step,train/loss,train/global_step\n0,0,3.5,10\n1,1,3.25,20\n",
    "W&B's export": '"Step","run-1 - train/loss","run-1 - train/global_step"\n"0","3.5","10"\n"1","3.25","20"\n',
    "Lightning": "epoch,step,train_loss,trainer/global_step\n0,0,3.5,10\n0,1,3.25,20\n",
    "a counter of other rows": "step,train/global_step,loss,eval\n10,,3.5,\n15,15,,1\n20,,3.25,\n",
    "tabs": "step\tloss\n10\t3.5\n20\t3.25\n",
    "semicolons": "step;loss;note\n10;3.5;a\n20;3.25;b\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", COUNTERS)
def test_the_steps_of_a_table_are_those_of_the_optimizer(tmp_path, name, encoding):
    path = tmp_path / "history.csv"
    path.write_text(COUNTERS[name], encoding=encoding)
    log = read_log(path)
    assert (log.steps.tolist(), log.columns["loss"].tolist()) == ([10, 20], [3.5, 3.25])


WRONG = {
    "binary": (b"\x01\x02\x00\x03" * 50, "a binary file"),
    "a checkpoint": (b"PK\x03\x04" + bytes(60), "a zip archive"),
    "packed twice": (gzip.compress(gzip.compress(b"step,loss\n1,2\n")), "packed with gzip twice"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), "packed with zstd"),
    "a web page": ("<!DOCTYPE html>\n<html></html>\n", "a web page"),
    "JSON without losses": ('{\n "a": 1,\n "b": [1, 2]\n}\n', "it holds: a, b"),
    "JSON, deep": ("[" * 100_000, "nested too deep"),
    "empty, packed": (gzip.compress(b""), "is empty"),
    "steps that are none": ("step,loss\n1e300,2\nnan,3\n", "without any step"),
    "no such file": (None, "no such file"),
    "empty": ("", "is empty"),
    "text": ("hello\nworld\n", "Known: "),
    "no loss": ("step,perplexity\n1,2\n", "no loss among step, perplexity"),
    "no rows": ("step,loss\n", "without any step"),
    "cut short": (gzip.compress(b"step,loss\n1,3.5\n" * 1000)[:-20], "cannot be read"),
    "several W&B runs": ('"Step","a - train/loss","b - train/loss"\n1,2,3\n', "2 W&B runs"),
    "no archive": (b"not packed", "cannot be read"),
    "broken JSON": ('{"step": 1, "loss": 2}\n{"step"\n{"step": 2, "loss": 2}\n', "line 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_clear_message(tmp_path, name):
    text, message = WRONG[name]
    path = tmp_path / ("log.csv.gz" if isinstance(text, bytes) else "log.csv")
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as error:
        read_logs(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_logs_are_read_or_refused_and_nothing_else(tmp_path, seed):
    rng = np.random.default_rng(seed)
    sources = [*TABLES.values(), *COUNTERS.values(), *DOCUMENTS.values(), line(1, "2.5") * 3, FACE * 3, NEMO * 2, TITAN * 2]
    odd = [b"nan", b"1e300", b"-1", b"9" * 30, b"\n", b"\r", b'"', b"{", b"[", b"\xef\xbb\xbf", b"\0", b",", b"e9999", b"\xff"]
    path = tmp_path / "log"
    for _ in range(50):
        content = sources[rng.integers(len(sources))].encode()
        for _ in range(rng.integers(1, 6)):
            start, stop = sorted(rng.integers(0, len(content) + 1, 2))
            added = odd[rng.integers(len(odd))] if rng.random() < 0.5 else b""
            content = content[:start] + added + content[start if added else stop :]
        path.write_bytes(content)
        try:
            logs = read_logs(path)
        except UsageError as error:
            assert str(path) in str(error)
        else:
            assert all(len(log.steps) for log in logs)
