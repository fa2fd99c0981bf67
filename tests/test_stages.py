"""Training in stages as it is run for days: on two processes, killed at any moment, from the command line.

This file is also the script that other processes run: python test_stages.py team FOLDER RANK | killed FOLDER
"""
import json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from vlwb.core import make_generator, seed_everything
from vlwb.data.inputs import TensorSet, WordTokenizer
from vlwb.data.scenes import make_captions
from vlwb.data.world import COLOURS, GRID, SHAPES, SIZES, SceneConfig, make_scenes, render
from vlwb.models.albef import AlbefConfig, AlbefModel
from vlwb.train.backbone import cell_labels
from vlwb.train.loop import Batches, TrainConfig, latest_checkpoint, train
from vlwb.train.masking import special_tokens
from vlwb.train.objectives import AuxFeatures, LossConfig
from vlwb.train.pretraining import PretrainConfig, PretrainObjective
from vlwb.train.processes import average_gradients, join_team, leave_team, own_share
from vlwb.train.stages import PRESETS, run_stages

torch.set_num_threads(1)
SRCL = PretrainConfig(LossConfig('srcl', candidates='momentum', queue_size=40, similarity_temperature=.3, momentum=.9), spare_below=.3)
RUN = TrainConfig(steps=6, lr=1e-3, device='cpu', log_every=1, checkpoint_every=2)


def world(n=96):
    "Scenes as grids of one-hot cells, captions, special tokens, H's features."
    scenes = make_scenes(n, seed=0, config=SceneConfig(max_objects=2))
    captions = make_captions(scenes, per_scene=2, seed=0, false_negative_share=.1)
    cells = cell_labels(scenes).flatten(2)
    grid = torch.cat([F.one_hot(cells[:, i] + 1, k + 2) for i, k in enumerate((len(SHAPES), len(COLOURS), len(SIZES)))], -1).permute(0, 2, 1).reshape(n, -1).float()
    tokenizer = WordTokenizer.learn(captions.text)
    unit = lambda rows, seed: F.normalize(torch.randn(rows, 6, generator=make_generator(seed)), dim=1)
    return TensorSet(grid, tokenizer(captions.text), captions.scene), special_tokens(tokenizer, extra_mask=True), AuxFeatures(unit(n, 1), unit(2*n, 2))


def small_model(data, special, dropout=0.):
    seed_everything(0)
    return AlbefModel(AlbefConfig(channels=data.images.shape[1]//GRID**2, vocab_size=special.vocab_size, vision_width=32, vision_layers=1, text_width=32, text_layers=1, fusion_layers=1, projection_dim=16, dropout=dropout))


# On two processes ------------------------------------------------------------------------------------------------------------------------------

def three_steps(dtype, team=None):
    "Losses, gradients and queue of three steps of plain descent, with captions of one image and a batch of uneven shares."
    data, special, aux = world()
    data, aux = TensorSet(data.images.to(dtype), data.texts, data.caption_image), AuxFeatures(aux.images.to(dtype), aux.texts.to(dtype))
    model = small_model(data, special).to(dtype).train()
    objective = PretrainObjective(SRCL, 3, special, aux, group=None if team is None else team.group)
    objective.prepare(model)
    out = {}
    for step, batch in zip(range(3), Batches(data, 15, one_caption_per_image=False)(0)):
        mine = batch if team is None else own_share(batch, team)
        model.zero_grad()
        loss, stats = objective(model, mine, step)
        loss.backward()
        if team is not None: average_gradients(model, team)
        out |= {f'{step} loss': loss.detach(), **{f'{step} {k}': torch.tensor(stats[k], dtype=torch.float64) for k in ('contrast', 'itm', 'mlm', 'itm_right', 'itm_without_negative', 'itm_spared')}}
        out |= {f'{step} gradient {n}': p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in model.parameters(): p -= 0.05 * p.grad if p.grad is not None else 0
        objective.after_step(model)
        out |= {f'{step} queue {n}': x.clone() for n, x in objective.state.queue.entries().items()}
    return out


class Killed(Exception): pass


def trained(folder=None, stop=None, dropout=0., steps=RUN.steps):
    "Weights and log of a short run; `stop` raises at that step."
    data, special, aux = world()
    model, objective = small_model(data, special, dropout), PretrainObjective(SRCL, steps, special, aux)
    call = type(objective).__call__
    class Stopping(type(objective)):
        def __call__(self, model, batch, step):
            if step == stop: raise Killed
            return call(self, model, batch, step)
    objective.__class__ = Stopping
    log = train(model, Batches(data, 16), objective, replace(RUN, steps=steps), folder, progress=False)
    return model.state_dict(), [r['loss'] for r in log]


def as_one_of_two(folder, rank):
    "What each of two processes does."
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    team = join_team('cpu')
    found = {f'steps {d}': three_steps(d, team) for d in (torch.float64, torch.float32)}
    found['plain'] = trained(folder/'plain')
    for name, dropout in (('cut', 0.), ('cut dropout', .1)):
        try: trained(folder/name, stop=5, dropout=dropout)
        except Killed: pass
        dist.barrier()
        if team.leads: shutil.copytree(folder/name, folder/f'{name} copy')
        dist.barrier()
        found[name] = trained(folder/name, dropout=dropout)
    found['whole dropout'] = trained(folder/'whole dropout', dropout=.1)
    torch.save(found, folder/f'{rank}.pt')
    leave_team()


@pytest.fixture(scope='module')
def team(tmp_path_factory):
    "What two processes found, and their folder."
    folder = tmp_path_factory.mktemp('team')
    jobs = [subprocess.Popen([sys.executable, __file__, 'team', folder, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS='1')) for rank in (0, 1)]
    try: said = [job.communicate(timeout=540)[0] for job in jobs]
    finally:
        for job in jobs: job.kill()
    assert [job.returncode for job in jobs] == [0, 0], '\n'.join(said)
    return folder, [torch.load(folder/f'{rank}.pt') for rank in (0, 1)]


@pytest.mark.parametrize('dtype, allowed', [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['float64', 'float32'])
def test_step_on_two_processes_is_that_of_one(team, dtype, allowed):
    "Contrast with queue and H, matching with its draws, masked words: losses, gradients and queue."
    one = three_steps(dtype)
    assert sum('gradient' in k for k in one) > 100 and one['2 queue image_queue'].shape[0] == 40
    for process in team[1]:
        two = process[f'steps {dtype}']
        assert two.keys() == one.keys()
        for name, value in one.items():
            scale = max(value.abs().max().item(), 1e-2) if value.is_floating_point() else 1
            rounded = 1e-6 if name.endswith(('itm', 'loss')) else 0                              # matching computes its cross-entropy in float32
            assert (two[name].to(value.dtype) - value).abs().max().item() <= max(allowed, rounded) * scale, name


def test_run_on_two_processes_is_that_of_one(team):
    weights, losses = trained()
    for process in team[1]:
        for name, value in weights.items(): torch.testing.assert_close(process['plain'][0][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert team[1][0]['plain'][1] == pytest.approx(losses, rel=1e-4) and len(losses) == RUN.steps and team[1][1]['plain'][1] == []       # one of them logs


def test_two_processes_resume_bit_for_bit(team):
    "Dropout draws differ between the processes, and each gets its own back."
    for process in team[1]:
        for cut, whole in (('cut', 'plain'), ('cut dropout', 'whole dropout')):
            for name, value in process[whole][0].items(): assert torch.equal(process[cut][0][name], value), (cut, name)
    assert team[1][0]['cut dropout'][1] == team[1][0]['whole dropout'][1]
    kept = load_file(latest_checkpoint(team[0]/'whole dropout')/'state.safetensors')
    assert not torch.equal(kept['rng.0.cpu'], kept['rng.1.cpu'])
    states = [process['whole dropout'][0] for process in team[1]]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])                       # both hold the same model


def test_one_process_goes_on_where_two_stopped(team, tmp_path):
    shutil.copytree(team[0]/'cut copy', tmp_path/'run')
    assert latest_checkpoint(tmp_path/'run').name == 'checkpoint-00000004'
    weights, _ = trained(tmp_path/'run')
    for name, value in trained()[0].items(): torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=name)


# Killed -----------------------------------------------------------------------------------------------------------------------------------------

def whole_training(folder):
    "Three short stages, with a save so slow that it can be hit."
    import safetensors.torch as st
    fast = st.save_file
    def slow(tensors, filename, *more, **kw):
        fast(tensors, filename, *more, **kw)
        content = Path(filename).read_bytes()
        Path(filename).write_bytes(content[:len(content)//2]); time.sleep(.03)                    # half a file for a while
        Path(filename).write_bytes(content)
    st.save_file = slow
    data, special, _ = world()
    tiny = PRESETS['tiny-scenes']
    short = lambda s, steps: replace(s, batch_size=12, train=replace(s.train, steps=steps, device='cpu', log_every=1, checkpoint_every=2),
                                     objective=replace(s.objective, contrast=replace(s.objective.contrast, queue_size=40 if s.objective.contrast.queue_size else 0)))
    preset = replace(tiny, aux=short(tiny.aux, 4), pretrain=short(tiny.pretrain, 10), finetune=short(tiny.finetune, 4))
    run_stages(preset, dict(aux=data, pretrain=data, finetune=data), lambda: small_model_as_seeded(data, special), special, folder, progress=False)


def small_model_as_seeded(data, special):
    return AlbefModel(AlbefConfig(channels=data.images.shape[1]//GRID**2, vocab_size=special.vocab_size, vision_width=32, vision_layers=1, text_width=32, text_layers=1, fusion_layers=1, projection_dim=16, dropout=.1))


def broken(folder):
    "Checkpoints and models that cannot be read whole."
    from safetensors.torch import load_file
    bad = []
    for part in [*folder.glob('*/checkpoint-*'), *folder.glob('*/model')]:
        files = {f.name for f in part.iterdir()}
        if part.name != 'model' and not {'model.safetensors', 'state.safetensors', 'state.json'} <= files: bad.append(part)
        for f in part.glob('*.safetensors'):
            try: load_file(f)
            except Exception as e: bad.append((f, e))
        for f in part.glob('*.json'): json.loads(f.read_text())
    return bad


def killed_again_and_again(folder):
    "Forks a training, kills it at a random moment or in the middle of a checkpoint, and again, until one comes to its end."
    def child(where):
        if pid := os.fork(): return pid
        try: whole_training(where)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
        os._exit(0)
    data, special, _ = world()
    small_model(data, special)                                                                   # what takes long to import is there before the first fork
    start = time.perf_counter()
    assert os.waitpid(child(folder/'whole'), 0)[1] == 0
    lasts, rng, kills, hits = time.perf_counter() - start, random.Random(4), 0, 0
    while kills < 60:
        pid, until, wait = child(folder/'killed'), time.perf_counter() + rng.uniform(.1, .6) * lasts, rng.random() < .5
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            writing = wait and time.perf_counter() > until - .3*lasts and any((folder/'killed').glob('*/.writing-*/*'))
            if writing or time.perf_counter() > until: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); kills += 1; hits += writing; break
            time.sleep(.001)
        else:
            assert ended[1] == 0
            break
        assert not broken(folder/'killed'), broken(folder/'killed')
        if kills >= 8: assert os.waitpid(child(folder/'killed'), 0)[1] == 0; break
    print(json.dumps(dict(kills=kills, hits=hits, lasts=lasts)))


def test_killed_training_ends_as_if_nothing_had_happened(tmp_path):
    "kill -9 at random moments of all stages, some while a checkpoint is written: never a broken file, and the end is the same bit for bit."
    done = subprocess.run([sys.executable, __file__, 'killed', tmp_path], capture_output=True, text=True, timeout=580, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts['kills'] >= 4 and counts['hits'] >= 1, counts
    for stage in ('aux', 'pretrain', 'finetune'):
        names = {p.relative_to(tmp_path/'whole') for p in (tmp_path/'whole'/stage).rglob('*.safetensors')}
        assert len(names) >= 3 and names == {p.relative_to(tmp_path/'killed') for p in (tmp_path/'killed'/stage).rglob('*.safetensors')}
        for name in names:                                                                       # tensor by tensor: the order of names in a header is not fixed
            whole, killed = (load_file(tmp_path/run/name) for run in ('whole', 'killed'))
            assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole), name
        logs = [[{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in (tmp_path/run/stage/'log.jsonl').read_text().splitlines()] for run in ('whole', 'killed')]
        assert logs[0] == logs[1]


# From the command line --------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A data folder in Karpathy's form: 60 pictures to train on, 10 and 16 to judge on."
    from PIL import Image
    root = tmp_path_factory.mktemp('data')
    scenes = make_scenes(86, seed=2, config=SceneConfig(max_objects=2))
    captions = make_captions(scenes, per_scene=2, seed=2)
    for i, picture in enumerate(render(scenes, 32)): Image.fromarray(picture).save(root/f'{i}.png')
    split = lambda i: 'train' if i < 50 else 'restval' if i < 60 else 'val' if i < 70 else 'test'
    own = lambda i: [t for t, s in zip(captions.text, captions.scene) if s == i]
    images = [dict(filename=f'{i}.png', imgid=i, cocoid=i, split=split(i), sentences=[dict(raw=t, sentid=9*i + k, imgid=i) for k, t in enumerate(own(i))]) for i in range(86)]
    (root/'dataset_coco.json').write_text(json.dumps(dict(dataset='coco', images=images)))
    return root


def vlwb(*arguments, launch=(), code=0):
    done = subprocess.run([sys.executable, *launch, '-m', 'vlwb.cli', *map(str, arguments)], capture_output=True, text=True, timeout=580, env=os.environ | dict(TERM='dumb', COLUMNS='140', NO_COLOR='1', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


TWO = '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0'.split()


def test_preset_on_two_processes_from_the_command_line(folder, tmp_path):
    "One line on either side of accelerate launch: trained once, said once, judged with and without the matching head."
    common = 'train', '--preset', 'tiny', '--data', folder, '--scale-steps', .01, '--batch-size', 12, '--queue-size', 40, '--device', 'cpu', '--out', tmp_path/'run'
    out = vlwb(*common, launch=TWO)
    assert out.count('Trained aux for 1 steps, pretrain for 4 steps') == 1 and 'R@1' in out
    results = json.loads((tmp_path/'run'/'results.json').read_text())
    assert results['split'] == 'test' and (tmp_path/'run'/'finetune'/'model'/'model.safetensors').exists()
    again = vlwb(*common)                                                                        # one process finds the run of two finished
    assert 'finetune for 1 steps' in again
    judged = json.loads(vlwb('eval', tmp_path/'run', folder, '--split', 'test', '--rerank', 8, '--json').splitlines()[-1])
    assert judged['images'] == 16 and judged['strict']['rsum'] == pytest.approx(results['rsum'], abs=1e-6) and 'strict, first 8 re-ranked' in judged


def test_dry_run_writes_nothing_and_says_what_does_not_fit(folder, tmp_path):
    before = sorted(p.name for p in folder.iterdir())
    out = vlwb('train', '--preset', 'tiny', '--data', folder, '--device', 'cpu', '--out', tmp_path/'run', '--dry-run', code=1)
    assert not (tmp_path/'run').exists() and sorted(p.name for p in folder.iterdir()) == before
    assert 'more than half of the 120' in out and 'Parameters' in out and 'activations' in out and 'a step' in out


def test_options_that_contradict_each_other(folder):
    from typer.testing import CliRunner
    from vlwb.cli import app
    said = lambda *arguments: str(CliRunner().invoke(app, ['train', *map(str, arguments)]).exception)
    assert 'PAIRS does not go with --preset' in said('pairs.csv', '--preset', 'tiny', '--data', folder)
    assert '--hidden, --lr does not go' in said('--preset', 'tiny', '--data', folder, '--hidden', 3, '--lr', .1)
    assert '--scale-steps goes with --preset NAME only' in said('pairs.csv', '--scale-steps', .5)
    assert 'needs --data' in said('--preset', 'tiny') and 'say what to train on' in said()
    assert 'no preset' in said('--preset', 'huge', '--data', folder) and 'tiny-scenes' in said('--preset', 'tiny', '--data', 'scenes')
    assert "one of srcl, infonce, albef, removal, got 'gist'" in said('--preset', 'tiny', '--data', folder, '--loss', 'gist')
    assert 'leave --vision and --text out' in said('--preset', 'tiny', '--data', folder, '--from-scratch', '--vision', 'a')


def test_dry_run_of_the_papers_stages_needs_no_network(folder, monkeypatch):
    "The three stages of the paper, with crops, RandAugment, larger images and an H that encodes each batch, on a narrow model."
    from vlwb.presets import prepare, rehearse_preset
    coco = PRESETS['coco']
    narrow = replace(coco, model=AlbefConfig(image_size=256, patch_size=64, channels=3, vision_width=32, vision_layers=1, text_width=32, text_layers=1, fusion_layers=1, max_length=64, projection_dim=16))
    ready = prepare(narrow, folder, rehearsal=True)
    assert 'not at hand' in ready.notes[0]
    found = rehearse_preset(ready)
    assert [r['stage'] for r in found.stages] == ['aux', 'pretrain', 'finetune'] and found.stages[1]['memory']['H'] == found.stages[1]['memory']['parameters'] > found.stages[2]['memory']['H'] == 0
    assert sum('cannot be filled' in p for p in found.problems) == 3 and all('fit' not in p for p in found.problems if 'needs about' in p)


if __name__ == '__main__':
    if sys.argv[1] == 'team': as_one_of_two(Path(sys.argv[2]), int(sys.argv[3]))
    else: killed_again_and_again(Path(sys.argv[2]))
