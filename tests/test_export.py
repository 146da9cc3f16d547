"""attention in torch.export: saved, loaded, run at other lengths and in another process."""

import io
import subprocess
import sys

import pytest
import torch

import tilewise


class Attend(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sink = torch.nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, q, k, v, lengths):
        last = lengths - q.shape[2]  # the last query stands at the last real key
        mask = tilewise.Causal(last) & tilewise.Padding(lengths) & tilewise.Window(3, None, last)
        return tilewise.attention(
            q, k, v, mask=mask, score=tilewise.Softcap(2.0), sink=self.sink, impl="portable", return_lse=True
        )


def export_inputs(q_len, kv_len, device):
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (q_len, kv_len, kv_len))
    return q, k, v, torch.tensor([kv_len - 1], device=device)


def exported(model, device) -> torch.export.ExportedProgram:
    q_len, kv_len = torch.export.Dim("q_len", min=2, max=512), torch.export.Dim("kv_len", min=2, max=512)
    shapes = {"q": {2: q_len}, "k": {2: kv_len}, "v": {2: kv_len}, "lengths": None}
    return torch.export.export(model, export_inputs(5, 7, device), dynamic_shapes=shapes)


@pytest.mark.oldest
def test_export_save_load_run(device):
    model, saved = Attend().to(device), io.BytesIO()
    torch.export.save(exported(model, device), saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for sizes in ((5, 7), (9, 4)):
        given = export_inputs(*sizes, device)
        assert all(map(torch.equal, loaded(*given), model(*given)))


def test_an_exported_program_runs_in_another_process(device, tmp_path):
    model, given = Attend().to(device), export_inputs(6, 9, device)
    torch.export.save(exported(model, device), tmp_path / "attend.pt2")
    torch.save([*given, *model(*given)], tmp_path / "tensors.pt")
    script = (
        "import torch, tilewise\n"
        "*given, out, lse = torch.load('tensors.pt')\n"
        "got = torch.export.load('attend.pt2').module()(*given)\n"
        "assert torch.equal(got[0], out.detach()) and torch.equal(got[1], lse.detach())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
