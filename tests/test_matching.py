"""Synthetics, contrast and OSCAR's matching on two processes, as on one; runs that were cut; and what a gate sees of a queue.

The worker that the two processes run is this file itself.
"""
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from vlwb.core import make_generator, seed_everything
from vlwb.data.inputs import TensorSet, WordTokenizer
from vlwb.data.scenes import holds, make_captions
from vlwb.data.world import SceneConfig, make_scenes
from vlwb.models.oscar import OscarConfig, OscarModel
from vlwb.negatives.synthesis import SynthesisConfig
from vlwb.train.loop import Batches, TrainConfig, train
from vlwb.train.matching import MatchingConfig, MatchingObjective, gather_inputs
from vlwb.train.objectives import AuxFeatures, LossConfig
from vlwb.train.processes import average_gradients, join_team, leave_team, own_share

torch.set_num_threads(1)
SMALL = SynthesisConfig(hardest=8, strata=2, gate=.3, mixed=3, with_anchor=2, each=1)
LOSSES = {'itcontrast, gated by H, regulated, queue': LossConfig('itcontrast', synthesis=SMALL, regulated=True, similarity_temperature=.3, queue_size=20, momentum=.9),
          'itcontrast, momentum view, own modality': LossConfig('itcontrast', synthesis=SMALL, view='momentum', similarity_temperature=.3, queue_size=20, momentum=.9, intra_weight=.5),
          'itcontrast, mined, gated by H, queue': LossConfig('itcontrast', synthesis=SMALL, similarity_temperature=.3, queue_size=20, momentum=.9, mined=3, mined_every=2),
          'synco, mined once, gated by truth': LossConfig('synco', synthesis=replace(SMALL, gate=0.), gate_by='truth', mined=3, mined_every=0),
          'mochi': LossConfig('mochi', synthesis=replace(SMALL, gate=0.)), 'synco, gated by truth': LossConfig('synco', synthesis=replace(SMALL, gate=0.), gate_by='truth')}


def world(n=64):
    "Scenes as random regions of different numbers, captions, truth, H's features."
    scenes = make_scenes(n, seed=0, config=SceneConfig(max_objects=2))
    captions = make_captions(scenes, per_scene=2, seed=0, false_negative_share=.1)
    tokenizer = WordTokenizer.learn(captions.text)
    regions = torch.randn(n, 5*10, generator=make_generator(3))
    unit = lambda rows, seed: F.normalize(torch.randn(rows, 6, generator=make_generator(seed)), dim=1)
    return TensorSet(regions, tokenizer(captions.text), captions.scene), tokenizer.vocab_size, AuxFeatures(unit(n, 1), unit(2*n, 2)), torch.from_numpy(holds(scenes, captions))


class Regions:
    "A set whose images are dicts of regions, each batch with as many as its fullest image."
    def __init__(self, data): self.data, self.caption_image, self.num_images, self.texts_at = data, data.caption_image, data.num_images, data.texts_at
    def images_at(self, index):
        index = torch.as_tensor(index)
        count, images = 2 + index % 4, self.data.images_at(index)
        mask = torch.arange(int(count.max())) < count[:,None]
        return dict(regions=images.view(len(images), 5, 10)[:,:mask.shape[1]] * mask[...,None], region_mask=mask)
    def batch(self, index, epoch=0):
        b = self.data.batch(index)
        b.images = self.images_at(b.image_ids)
        return b


def model_of(vocabulary):
    seed_everything(0)
    return OscarModel(OscarConfig(vocab_size=vocabulary, width=16, layers=1, heads=2, region_dim=10, grid_side=0, projection_dim=8, pooling='mean'))


def three_steps(name, dtype=torch.float64, team=None):
    "Losses, figures, gradients and queue of three steps of plain descent, with uneven shares."
    data, vocabulary, aux, truth = world()
    data, aux = TensorSet(data.images.to(dtype), data.texts, data.caption_image), AuxFeatures(aux.images.to(dtype), aux.texts.to(dtype))
    model, loss = model_of(vocabulary).to(dtype).train(), LOSSES[name]
    config = MatchingConfig(loss, spare_below=.2 if loss.weighs else 0., spare_temperature=.3)
    objective = MatchingObjective(config, 3, aux if config.needs_aux else None, truth, group=None if team is None else team.group, data=Regions(data))
    objective.prepare(model)
    out = {}
    for step, batch in zip(range(3), Batches(Regions(data), 13, one_caption_per_image=False)(0)):
        mine = batch if team is None else own_share(batch, team)
        model.zero_grad()
        value, stats = objective(model, mine, step)
        value.backward()
        if team is not None: average_gradients(model, team)
        out |= {f'{step} loss': value.detach()} | {f'{step} {k}': torch.tensor(v, dtype=torch.float64) for k, v in stats.items()}
        out |= {f'{step} gradient {n}': p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in model.parameters(): p -= 0.05 * p.grad if p.grad is not None else 0
        objective.after_step(model)
        if objective.contrast.slow is not None: out |= {f'{step} queue {n}': x.clone() for n, x in objective.contrast.slow.queue.entries().items()}
        if objective.contrast.pool is not None: out |= {f'{step} pool {n}': x.double() for n, x in objective.contrast.pool.named_buffers()}
    return out


def as_one_of_two(folder, rank):
    "What each of two processes does."
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    team = join_team('cpu')
    found = {name: three_steps(name, team=team) for name in LOSSES}
    ragged = torch.arange(12.).view(2, 2, 3) + rank if rank == 0 else torch.arange(9.).view(1, 3, 3) + rank
    found['gathered'] = gather_inputs(dict(regions=ragged, region_mask=torch.ones(ragged.shape[:2], dtype=torch.bool)), team.group)
    torch.save(found, folder/f'{rank}.pt')
    leave_team()


@pytest.fixture(scope='module')
def team(tmp_path_factory):
    "What two processes found."
    folder = tmp_path_factory.mktemp('team')
    jobs = [subprocess.Popen([sys.executable, __file__, folder, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS='1')) for rank in (0, 1)]
    try: said = [job.communicate(timeout=300)[0] for job in jobs]
    finally:
        for job in jobs: job.kill()
    assert [job.returncode for job in jobs] == [0, 0], '\n'.join(said)
    return [torch.load(folder/f'{rank}.pt') for rank in (0, 1)]


@pytest.mark.parametrize('name', LOSSES)
def test_step_on_two_processes_is_that_of_one(team, name):
    "Synthetics, their figures, contrast with queue and H, matching with its draws: losses, gradients and queue."
    one = three_steps(name)
    assert sum('gradient' in k for k in one) > 60 and '2 synthetic_false' in one and '2 itm_right' in one
    assert ('2 queue image_queue' in one) == bool(LOSSES[name].queue_size)
    for process in team:
        two = process[name]
        assert two.keys() == one.keys()
        for key, value in one.items():
            if key.endswith('alpha'): continue
            scale = max(value.abs().max().item(), 1e-2) if value.is_floating_point() else 1
            assert (two[key].to(value.dtype) - value).abs().max().item() <= (1e-6 if key.endswith(('itm', 'loss')) or LOSSES[name].queue_size or LOSSES[name].mined else 1e-9) * scale, key   # matching's cross-entropy, queue and pool are float32


def test_gathered_inputs_are_filled_up(team):
    for process in team:
        regions, mask = process['gathered']['regions'], process['gathered']['region_mask']
        assert regions.shape == (3, 3, 3) and mask.sum(1).tolist() == [2, 2, 3] and not regions[:2, 2].any()


@pytest.mark.parametrize('name', LOSSES)
def test_a_cut_run_ends_as_an_uncut_one(name, tmp_path):
    data, vocabulary, aux, truth = world()
    class Killed(Exception): pass
    def run(folder, stop=None):
        config = MatchingConfig(LOSSES[name])
        objective = MatchingObjective(config, 6, aux if config.needs_aux else None, truth, data=Regions(data))
        call = MatchingObjective.__call__
        class Stopping(MatchingObjective):
            def __call__(self, model, batch, step):
                if step == stop: raise Killed
                return call(self, model, batch, step)
        objective.__class__ = Stopping
        model = model_of(vocabulary)
        train(model, Batches(Regions(data), 16), objective, TrainConfig(steps=6, lr=1e-3, device='cpu', log_every=1, checkpoint_every=2), folder, progress=False)
        return model.state_dict()
    with pytest.raises(Killed): run(tmp_path/'cut', stop=3)
    cut, whole = run(tmp_path/'cut'), run(tmp_path/'whole')
    assert all(torch.equal(cut[n], whole[n]) for n in whole)


if __name__ == '__main__': as_one_of_two(Path(sys.argv[1]), int(sys.argv[2]))
