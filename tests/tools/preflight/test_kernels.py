"""The kernel of attention is named, and a rank with another one found."""

from tools.preflight.kernels import fp8_problems, kernel_facts, kernel_notes, kernel_problems

CUDNN, FLASH = ["cuDNN", "torch's first choice here"], ["flash", "not cuDNN: an old library"]
HOSTS = ["a", "a", "b", "b"]


def devices(*kernels):
    return {rank: {"name": "H100", "attention": {"full": kernel}} for rank, kernel in enumerate(kernels)}


def test_a_host_with_another_kernel_is_named():
    [problem] = kernel_problems(devices(CUDNN, CUDNN, CUDNN, FLASH), HOSTS)
    assert (problem.hosts, problem.ranks) == (("b",), (3,))
    assert "full layers runs on the flash kernel (not cuDNN: an old library), on most on cuDNN" in problem.message
    assert kernel_problems(devices(FLASH, FLASH, FLASH, FLASH), HOSTS) == []


def test_the_notes_say_what_runs_or_would_run():
    assert kernel_notes(devices(FLASH, FLASH), ["unused"]) == [
        "attention of full layers runs on the flash kernel (not cuDNN: an old library)"
    ]
    without = {0: {"name": "x86_64", "attention": {}}, 1: {"error": "no GPU"}}
    assert kernel_problems(without, HOSTS) == []
    assert kernel_notes(without, ["full layers: flash"]) == ["attention on a GPU: full layers: flash"]


def test_gpus_that_cannot_multiply_in_fp8_are_named_by_host():
    found = {rank: {"name": name, "capability": capability} for rank, (name, capability) in
             enumerate([("H100", [9, 0]), ("H100", [9, 0]), ("H100", [9, 0]), ("A100", [8, 0])])}  # fmt: skip
    [problem] = fp8_problems(found, HOSTS)
    assert (problem.hosts, problem.ranks) == (("b",), (3,))
    assert "A100 has compute capability 8.0" in problem.message and "precision=None" in problem.cure
    assert fp8_problems({0: {"name": "x86_64"}, 1: {"error": "no GPU"}}, HOSTS) == []


def test_without_a_gpu_no_kernel_is_asked_for():
    assert kernel_facts("cpu", [{"layers": "full"}]) == {} == kernel_facts("cuda", [])
