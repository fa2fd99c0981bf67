"Training as it is run for hours: killed at any moment, resumed, and equal to the uninterrupted run."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
import torch
from vlwb.data.inputs import TensorSet
from vlwb.data.toy import hidden_matches
from vlwb.models.dual import DualEncoder, DualEncoderConfig
from vlwb.core import seed_everything
from vlwb.train.loop import Batches, TrainConfig, latest_checkpoint, load_checkpoint, make_optimizer, read_log, train
from vlwb.train.objectives import LossConfig, Objective
from vlwb.train.recipe import Recipe, run_recipe

JOB = '''
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_train import make, batches, recipe
from vlwb.train.recipe import run_recipe
run_recipe(make, batches(), recipe, folder=sys.argv[1], progress=False)
print('finished', flush=True)
'''
recipe = Recipe(LossConfig('srcl', similarity_temperature=.2), TrainConfig(steps=90, lr=1e-2, device='cpu', checkpoint_every=3, log_every=1), aux_steps=20)


def make(): return DualEncoder(DualEncoderConfig(vision=dict(features=20, hidden=256), text=dict(features=12, hidden=256), projection_dim=64))
def batches():
    toy = hidden_matches()
    return Batches(TensorSet(toy.images, toy.texts, toy.caption_image), 32)


def start(folder): return subprocess.Popen([sys.executable, '-c', JOB.format(here=str(Path(__file__).parent)), str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "kill -9 at three moments, checkpoints every third step: no broken checkpoint is left, and the end is the same bit for bit."
    assert start(tmp_path/'whole').communicate(timeout=120)[0].strip() == 'finished'
    for target in (4, 17, 40):
        job = start(tmp_path/'killed')
        deadline = time.time() + 90
        while time.time() < deadline and job.poll() is None:
            seen = latest_checkpoint(tmp_path/'killed')
            if seen and int(seen.name.split('-')[1]) >= target: break
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL); job.wait()
        left = latest_checkpoint(tmp_path/'killed')
        if left: load_checkpoint(left, (m := make()), make_optimizer(m, recipe.train))         # whole, whenever it was killed
    assert start(tmp_path/'killed').communicate(timeout=120)[0].strip() == 'finished'
    whole, killed = latest_checkpoint(tmp_path/'whole'), latest_checkpoint(tmp_path/'killed')
    assert whole.name == killed.name == 'checkpoint-00000070'
    for name in ('model.safetensors', 'state.safetensors'): assert (whole/name).read_bytes() == (killed/name).read_bytes(), name
    plain = lambda folder: [{k: v for k, v in r.items() if k != 'seconds'} for r in read_log(folder)]
    assert plain(tmp_path/'whole') == plain(tmp_path/'killed') and len(plain(tmp_path/'whole')) == 70


def test_finished_run_is_not_trained_again(tmp_path):
    seed_everything(0)
    first = train(make(), batches(), Objective(), TrainConfig(steps=4, device='cpu'), folder=tmp_path, progress=False)
    def never(model, batch, step): raise AssertionError('a finished run took another step')
    model = make()
    assert [r['step'] for r in train(model, batches(), never, TrainConfig(steps=4, device='cpu'), folder=tmp_path, progress=False)] == [r['step'] for r in first]


def test_log_cut_short_is_read_to_the_cut(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [dict(step=1, loss=2.)]


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip('tensorboard')
    seed_everything(0)
    train(make(), batches(), Objective(), TrainConfig(steps=2, device='cpu'), folder=tmp_path, progress=False, tensorboard=True)
    assert list(tmp_path.glob('events.out.tfevents*'))


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['infonce', 'srcl', 'removal', 'oracle_removal', 'oracle_positives'])
def test_every_objective_learns_the_labels(name, precision):
    toy = hidden_matches()
    config = TrainConfig(steps=40, lr=1e-2, device='cpu', precision=precision)
    done = run_recipe(make, batches(), Recipe(LossConfig(name, similarity_temperature=.3), config, aux_steps=10), truth=toy.truth, progress=False)
    assert done.log[-1]['loss'] < done.log[0]['loss'] and torch.isfinite(next(done.model.parameters())).all()
    assert json.dumps(done.log)
