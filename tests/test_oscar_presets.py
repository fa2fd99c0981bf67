"The presets of OSCAR from the command line to a judgement: a detector's files, plain photos, checkpoints, resuming; and re-ranking by a joint pass within its memory."
import base64, json, weakref
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner
from vlwb.cli import app
from vlwb.core import DataError, make_generator
from vlwb.data.regions import RegionStore
from vlwb.data.scenes import make_captions
from vlwb.data.world import SceneConfig, make_scenes, render
from vlwb.eval.rerank import PairInputs, encode_inputs, joint_bytes, rerank_scores
from vlwb.models.oscar import OscarConfig, OscarModel
from vlwb.presets import changed, prepare, rehearse_preset, train_preset
from vlwb.train.stages import PRESETS
from vlwb.workflows import LiveRegions, Photos, eval_pairs, load_model, open_regions, region_key

SMALL = '--scale-steps', .005, '--batch-size', 12, '--device', 'cpu'


def vlwb(*arguments, code=0):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert (done.exit_code if done.exception is None or isinstance(done.exception, SystemExit) else 2) == code, (done.output, done.exception)
    return done.output if code == 0 else done.output + str(done.exception)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Forty pictures with captions and splits, their regions as a TSV of bottom-up attention, labels beside it, and a tiny vision tower."
    from transformers import ViTConfig, ViTModel
    root = tmp_path_factory.mktemp('photos')
    scenes = make_scenes(40, seed=3, config=SceneConfig(max_objects=2))
    captions, pictures = make_captions(scenes, per_scene=2, seed=3), render(scenes, 48)
    for i, picture in enumerate(pictures): Image.fromarray(picture).save(root/f'{i}.png')
    rows = [dict(image=f'{i}.png', split='train' if i < 24 else 'val' if i < 30 else 'test', captions=[t for t, s in zip(captions.text, captions.scene) if s == i]) for i in range(40)]
    (root/'captions.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    text = lambda x: base64.b64encode(x.astype('<f4').tobytes()).decode()
    rng = np.random.default_rng(0)
    with open(root/'regions.tsv', 'w') as f, open(root/'labels.tsv', 'w') as tags:
        for i in [*range(40), 99]:                                                               # 99: nobody wrote a caption for it
            n = 2 + i % 4
            corner = rng.uniform(0, 24, (n, 2)); boxes = np.concatenate([corner, corner + rng.uniform(4, 20, (n, 2))], 1)
            f.write('\t'.join([str(i), '48', '48', str(n), text(boxes), text(rng.normal(size=(n, 10)) + (i % 5))]) + '\n')
            tags.write(f'{i}\t' + json.dumps([{'class': w} for w in ('red', 'circle')[:1 + i % 2]]) + '\n')
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(root/'vit')
    return root


def common(photos, out): return 'train', '--preset', 'oscar-tiny', '--data', photos/'captions.jsonl', *SMALL, '--out', out


def test_from_a_detectors_files(photos, tmp_path):
    "TSV and labels become a store of the images that are asked for; trained, stopped, gone on with, judged, re-ranked; the photos are not needed."
    alone = tmp_path/'captions.jsonl'; alone.write_text((photos/'captions.jsonl').read_text())
    regions = '--regions', photos/'regions.tsv', '--region-labels', photos/'labels.tsv', '--from-scratch'
    begin = 'train', '--preset', 'oscar-tiny', '--data', alone, *SMALL, '--out'
    out = vlwb(*begin, tmp_path/'run', *regions)
    assert 'Trained pretrain for 3 steps, finetune for 2 steps' in out and 'test, after stage finetune' in out
    store = RegionStore(tmp_path/'run'/'regions')
    assert len(store) == 40 and '99' not in store and store['3'].tags == ['red', 'circle'] and store.region_dim == 16
    found = json.loads((tmp_path/'run'/'results.json').read_text())
    judged = json.loads(vlwb('eval', tmp_path/'run', alone, '--split', 'test', '--rerank', 4, '--json').splitlines()[-1])
    assert judged['images'] == 10 and judged['strict']['rsum'] == pytest.approx(found['rsum']) and 'strict, first 4 re-ranked' in judged
    given = json.loads(vlwb('eval', tmp_path/'run', alone, '--split', 'test', '--regions', photos/'regions.tsv', '--region-labels', photos/'labels.tsv', '--json').splitlines()[-1])
    assert given['strict'] == judged['strict']
    assert 'there are none' in vlwb('eval', tmp_path/'run', alone, '--regions', photos/'regions.tsv', code=2)
    vlwb(*begin, tmp_path/'parts', *regions, '--stop-after', 'pretrain')
    assert not (tmp_path/'parts'/'finetune').exists()
    vlwb(*begin, tmp_path/'parts', *regions)
    for a, b in zip(load_model(tmp_path/'run')[0].state_dict().values(), load_model(tmp_path/'parts')[0].state_dict().values()): assert torch.equal(a, b)
    assert 'belongs to another run' in vlwb(*begin, tmp_path/'parts', '--regions', photos/'regions.tsv', '--from-scratch', code=2)
    assert 'another run' in vlwb(*begin, tmp_path/'parts', *regions, '--strata', 2, code=2)


def test_from_plain_photos(photos, tmp_path):
    "Grid regions of a tower, said as what they are; other photos under the same ids are seen anew."
    grid = '--regions', 'grid', '--vision', photos/'vit', '--from-scratch'
    before = sorted(p.name for p in photos.iterdir())
    dry = vlwb(*common(photos, tmp_path/'run'), *grid, '--dry-run')
    assert 'a grid, not what a detector sees' in dry and 'Everything fits' in dry and not (tmp_path/'run').exists() and before == sorted(p.name for p in photos.iterdir())
    out = vlwb(*common(photos, tmp_path/'run'), *grid, '--loss', 'synco', '--hardest', 8)
    assert 'a grid, not what a detector sees' in out
    assert len(RegionStore(tmp_path/'run'/'regions')) == 40 and load_model(tmp_path/'run')[1].regions['max_regions'] == 4
    judge = lambda folder: eval_pairs(tmp_path/'run', folder/'captions.jsonl', split='test', progress=False)['strict']['rsum']
    assert judge(photos) == pytest.approx(json.loads((tmp_path/'run'/'results.json').read_text())['rsum'])
    other = tmp_path/'other'; other.mkdir()
    for i in range(40): Image.new('RGB', (48, 48), (i, 0, 0)).save(other/f'{i}.png')
    (other/'captions.jsonl').write_text((photos/'captions.jsonl').read_text())
    from vlwb.train.objectives import encode_set
    from vlwb.workflows import as_dataset, read_set
    model, config, tokens = load_model(tmp_path/'run')
    a, b = (encode_set(model, as_dataset(read_set(f/'captions.jsonl', split='test'), config, tokens)).images for f in (photos, other))
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(ValueError, match='makes its own'): eval_pairs(tmp_path/'run', photos/'captions.jsonl', regions=photos/'regions.tsv')


def test_from_a_bert_and_from_a_store(photos, tmp_path):
    "A plain BERT with its vocabulary, as OSCAR itself started; what has no tensor there is said to start fresh."
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'red', 'circle', 'a', 'is', 'the', 'square', 'left', 'of']
    BertForMaskedLM(BertConfig(vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64)).save_pretrained(tmp_path/'bert')
    (tmp_path/'bert'/'vocab.txt').write_text('\n'.join(words))                                       # as OSCAR's folders have it
    dry = vlwb(*common(photos, tmp_path/'x'), '--regions', photos/'regions.tsv', '--start', tmp_path/'bert', '--dry-run')
    assert 'bert.img_embedding.weight' in dry and 'without object tags' in dry
    ready = prepare(PRESETS['oscar-tiny'], photos/'captions.jsonl', regions=photos/'regions.tsv', start=tmp_path/'bert', rehearsal=True)
    model = ready.make_model()
    assert model.config.pooling == 'mean' and model.config.cls_token_id == 2 and model.config.layers == 2 and ready.preset.model == model.config and ready.tokenizer.vocab_size == len(words)
    assert (ready.sets('pretrain', None).texts['input_ids'][:,0] == 2).all()
    with pytest.raises(DataError, match='no tokeniser'): prepare(PRESETS['oscar-tiny'], photos/'captions.jsonl', regions=photos/'regions.tsv', start=photos/'vit', rehearsal=True)


def test_where_a_training_starts(tmp_path):
    "`load_start` by each of its forms: tensors in the official naming, a model of this package, what does not fit."
    from vlwb.data.inputs import WordTokenizer
    from vlwb.models.dual import DualEncoder, DualEncoderConfig
    from vlwb.models.oscar import save_oscar
    from vlwb.presets import load_start
    tokenizer = WordTokenizer.learn(['a red circle', 'a blue square'])
    sizes = OscarConfig(vocab_size=len(tokenizer), width=16, layers=1, heads=2, region_dim=9, grid_side=0, projection_dim=8)
    torch.manual_seed(0); trained = OscarModel(sizes)
    own = replace(sizes, pooling='mean', temperature=.2)                                             # a preset's wishes
    save_oscar(tmp_path/'official', trained); trained.save_pretrained(tmp_path/'ours')
    model, fresh = load_start(tmp_path/'official', own, 9, tokenizer)
    assert model.config.pooling == 'mean' and model.config.temperature == .2 and all('projection' in n or 'scale' in n for n in fresh)
    for name, x in trained.bert.state_dict().items(): assert_close(model.bert.state_dict()[name], x, rtol=0, atol=0)
    model, fresh = load_start(tmp_path/'ours', own, 9, tokenizer)
    assert model.config == sizes and not fresh and all(torch.equal(x, model.state_dict()[n]) for n, x in trained.state_dict().items())       # its own settings stay
    with pytest.raises(DataError, match='reads regions of 9 numbers, those of the data have 12'): load_start(tmp_path/'ours', own, 12, tokenizer)
    with pytest.raises(DataError, match='vocabulary has .* name its own'): load_start(tmp_path/'ours', own, 9, WordTokenizer.learn(['some more words than it has seen before today or ever']))
    DualEncoder(DualEncoderConfig(vision=dict(features=4), text=dict(features=4), projection_dim=4)).save_pretrained(tmp_path/'dual')
    with pytest.raises((DataError, ValueError)): load_start(tmp_path/'dual', own, 9, tokenizer)
    with pytest.raises((DataError, ValueError)): load_start(tmp_path/'nowhere', own, 9, tokenizer)


def test_number_and_order_of_regions_from_the_command_line(photos, tmp_path):
    "The first regions of a file alone; files with height before width; both belong to a detector's files."
    common_here = *common(photos, tmp_path/'few')[:-1], tmp_path/'few', '--regions', photos/'regions.tsv', '--from-scratch'
    dry = vlwb(*common_here, '--max-regions', 2, '--dry-run')
    assert 'Everything fits' in dry
    ready = prepare(PRESETS['oscar-tiny'], photos/'captions.jsonl', regions=photos/'regions.tsv', from_scratch=True, rehearsal=True, max_regions=2)
    assert ready.inputs.regions['max_regions'] == 2 and ready.sets('finetune', None).images_at([0, 1, 2, 3])['regions'].shape[1] == 2
    rows = [line.split('\t') for line in (photos/'regions.tsv').read_text().splitlines()]
    boxes = lambda text: np.frombuffer(base64.b64decode(text), '<f4').reshape(-1, 4)
    six = lambda b: np.concatenate([b/48, (b[:,3:] - b[:,1:2])/48, (b[:,2:3] - b[:,:1])/48], 1)       # height first
    both = lambda r: np.concatenate([np.frombuffer(base64.b64decode(r[5]), '<f4').reshape(int(r[3]), -1), six(boxes(r[4]))], 1).astype('<f4')
    (tmp_path/'hw.tsv').write_text(''.join('\t'.join([r[0], r[3], base64.b64encode(both(r).tobytes()).decode()]) + '\n' for r in rows))
    said = vlwb(*common_here[:-2], tmp_path/'hw.tsv', '--from-scratch', code=2)
    assert "order='hw'" in said and 'hw.tsv, row 1' in said
    assert 'Trained' in vlwb(*common(photos, tmp_path/'hw'), '--regions', tmp_path/'hw.tsv', '--from-scratch', '--region-order', 'hw')
    assert json.loads((tmp_path/'hw'/'vlwb.json').read_text())['inputs']['regions']['order'] == 'hw'
    assert 'order' in vlwb(*common(photos, tmp_path/'grid'), '--regions', 'grid', '--vision', photos/'vit', '--from-scratch', '--region-order', 'hw', code=2)
    assert 'leave the order out' in vlwb(*common(photos, tmp_path/'x'), '--regions', tmp_path/'hw'/'regions', '--from-scratch', '--region-order', 'hw', '--dry-run', code=2)
    with pytest.raises(ValueError, match='max_regions must be at least 1'): open_regions(photos/'regions.tsv').at([0], -1)


def test_a_writer_that_was_killed_and_images_without_regions(photos, tmp_path):
    out = tmp_path/'run'
    (out/'.regions.abcd').mkdir(parents=True)
    rows = (photos/'regions.tsv').read_text().splitlines(keepends=True)
    (tmp_path/'fewer.tsv').write_text(''.join(r for r in rows if not r.startswith(('5\t', '35\t'))))
    small = changed(PRESETS['oscar-tiny'], run=dict(device='cpu'), scale=.005, batch_size=12)
    settings = dict(regions=tmp_path/'fewer.tsv', from_scratch=True, folder=out)
    with pytest.raises(DataError, match='1 of 24 images .* have no regions'): prepare(small, photos/'captions.jsonl', **settings).sets('pretrain', None)
    assert not (out/'.regions.abcd').exists() and len(RegionStore(out/'regions')) == 38
    ready = prepare(small, photos/'captions.jsonl', on_error='skip', **settings)
    assert [m.rpartition(': ')[2] for m in ready.skipped] == ['image 5.png has no regions', 'image 35.png has no regions']
    assert len(ready.sets('finetune', None)) == 46 and ready.judged['test'](None).num_images == 9
    with pytest.raises(ValueError, match='in which folder'): prepare(small, photos/'captions.jsonl', regions=tmp_path/'fewer.tsv', from_scratch=True)


def test_names_of_images_and_clashes(tmp_path):
    assert region_key(['COCO_val2014_000000000042.jpg', 'COCO_val2014_000000000007.jpg'], ['42', '7'])('COCO_val2014_000000000007.jpg') == '7'
    assert region_key(['a/3.png'], ['3'])('a/4.png') == '4' and region_key(['x'], []) is None and region_key([], []) is None
    from vlwb.data.pairs import Pairs
    one = lambda name: Pairs(['0'], ['a'], ['0'], [0], [tmp_path/name])
    assert Photos([one('a.png'), one('a.png')]).num_images == 1
    with pytest.raises(DataError, match='regions are kept by id'): Photos([one('a.png'), one('b.png')])
    with pytest.raises(DataError, match='no images'): Photos([replace(one('a.png'), images=None)])
    with pytest.raises(DataError, match='holds no regions'): open_regions(tmp_path)


def test_live_regions_are_as_stored(photos, tmp_path):
    from vlwb.data.regions import RegionReader, write_store
    store, live = write_store(tmp_path/'store', RegionReader(photos/'regions.tsv', photos/'labels.tsv')), open_regions(photos/'regions.tsv', photos/'labels.tsv')
    assert isinstance(live, LiveRegions) and live.ids == store.ids and live.region_dim == store.region_dim and live.tags_at([3, 0]) == store.tags_at([3, 0])
    for most in (None, 3):
        for a, b in zip(live.at([7, 2, 7, 40], most), store.at([7, 2, 7, 40], most)): assert torch.equal(a, b)
    with pytest.raises(KeyError, match='first .nothing'): live.find(['0', 'nothing'])


# Re-ranking by a joint pass -------------------------------------------------------------------------------------------------------------------------

class Peak(TorchDispatchMode):
    "Most bytes that the tensors made inside held at once."
    def __init__(self): super().__init__(); self.now = self.most = 0; self.seen = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, key = func(*args, **(kwargs or {})), lambda x: x.untyped_storage()._cdata
        given = {key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or key(x) in given | self.seen: continue
            size = x.untyped_storage().nbytes()
            self.seen.add(key(x)); self.now += size; self.most = max(self.most, self.now)
            weakref.finalize(x.untyped_storage(), self._gone, key(x), size)
        return out
    def _gone(self, key, size): self.now -= size; self.seen.discard(key)


class Set:
    "Images of uneven regions and tags, captions of uneven length."
    def __init__(self, config, images=7, captions=11):
        g, self.num_images, self.caption_image = make_generator(0), images, np.arange(captions) % images
        self.regions, self.shown = torch.rand(images, 6, config.region_dim, generator=g), torch.arange(6) < 2 + torch.arange(images)[:,None] % 5
        self.tags, self.tagged = torch.randint(5, 40, (images, 4), generator=g), torch.arange(4) < torch.arange(images)[:,None] % 5
        self.words, self.said = torch.randint(5, 40, (captions, 12), generator=g), torch.arange(12) < 3 + torch.arange(captions)[:,None] % 9
    def __len__(self): return len(self.caption_image)
    def images_at(self, i): i = torch.as_tensor(i); return dict(regions=self.regions[i], region_mask=self.shown[i], tag_ids=self.tags[i], tag_mask=self.tagged[i])
    def texts_at(self, j): j = torch.as_tensor(j); n = int(self.said[j].sum(1).max()); return dict(input_ids=(self.words*self.said)[j,:n], attention_mask=self.said[j,:n].long())


def test_joint_scores_are_each_pairs_own_at_any_budget():
    torch.manual_seed(0)
    model = OscarModel(OscarConfig(vocab_size=40, width=32, layers=2, heads=2, grid_side=0, region_dim=14, projection_dim=8, dropout=.2)).train()
    data = Set(model.config)
    inputs = encode_inputs(model, data, at_once=3, progress=False)
    assert isinstance(inputs, PairInputs) and model.training
    whole = rerank_scores(model, inputs, k=4, progress=False)
    model.eval()
    for side, c in whole.items():
        for q in range(len(c.index)):
            for n in range(4):
                i, j = (q, int(c.index[q,n])) if side == 'i2t' else (int(c.index[q,n]), q)
                with torch.no_grad(): assert_close(model.match_logits(data.images_at([i]), data.texts_at([j]))[0], c.logits[q,n], atol=1e-5, rtol=1e-5)
    for budget, at_once in ((1e-9, 512), (.05, 512), (.2, 1), (3., 2)):
        for side, c in rerank_scores(model, inputs, k=4, budget_mb=budget, images_at_once=at_once, progress=False).items(): assert_close(c.logits, whole[side].logits, atol=1e-5, rtol=1e-5)
    assert rerank_scores(model, inputs, k=0, progress=False)['i2t'].index.shape == (7, 0)


@pytest.mark.parametrize('sizes', [dict(width=64, heads=4), dict(width=32, heads=8, layers=2), dict(width=64, heads=2, region_dim=600)], ids=['tokens', 'heads', 'regions'])
def test_joint_scores_keep_to_their_memory(sizes):
    "More pairs than the budget holds: no more than it is taken at once, and not a small part of it."
    torch.manual_seed(0)
    model = OscarModel(OscarConfig(**dict(vocab_size=40, grid_side=0, region_dim=14, projection_dim=8) | sizes)).eval()
    inputs = encode_inputs(model, Set(model.config, 40, 60), progress=False)
    each = joint_bytes(model.config, 12 + 4 + 6, 6)
    budget = 24 * each / 2**20
    with Peak() as peak: rerank_scores(model, inputs, k=40, budget_mb=budget, progress=False)
    assert .4 * budget < peak.most / 2**20 <= budget, (peak.most / 2**20, budget)


def test_scores_that_are_not_finite_are_an_error():
    model = OscarModel(OscarConfig(vocab_size=40, width=32, layers=1, heads=2, grid_side=0, region_dim=14, projection_dim=8)).eval()
    inputs = encode_inputs(model, Set(model.config), progress=False)
    model.classifier.bias.data.fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite'): rerank_scores(model, inputs, k=2, progress=False)


# Dry runs and training from Python ------------------------------------------------------------------------------------------------------------------

def test_published_presets_are_rehearsed_without_a_checkpoint(photos):
    "The two stages of oscar-coco on a narrow model: no checkpoint at hand is no reason to stop."
    narrow = replace(PRESETS['oscar-coco'], model=replace(PRESETS['oscar-coco'].model, width=32, layers=1, heads=2, vocab_size=110, max_length=40))
    ready = prepare(narrow, photos/'captions.jsonl', regions=photos/'regions.tsv', labels=photos/'labels.tsv', rehearsal=True)
    assert 'no checkpoint is named' in ready.notes[-1] and ready.preset.model.vocab_size == 110 and ready.tokenizer.max_length == 40 - 30
    found = rehearse_preset(ready)
    assert [(r['stage'], r['steps']) for r in found.stages] == [('pretrain', 6), ('finetune', 1)] and sum('cannot be filled' in p for p in found.problems) == 2
    assert found.data[0]['cut'] > 0 and found.data[0]['images'] == 24
    with pytest.raises(ValueError, match='--start FOLDER'): prepare(narrow, photos/'captions.jsonl', regions=photos/'regions.tsv')


def test_interrupted_in_the_middle_of_stage_two(photos, tmp_path):
    "Killed after a checkpoint of stage 2 with a queue, and started again: the same weights."
    small = changed(PRESETS['oscar-tiny'], dict(name='mochi', queue_size=20), dict(device='cpu', checkpoint_every=2), scale=.02, batch_size=12, seed=3)
    make = lambda out: prepare(small, photos/'captions.jsonl', regions=photos/'regions.tsv', from_scratch=True, folder=out)
    whole, _ = train_preset(make(tmp_path/'whole'), tmp_path/'whole', progress=False)
    class Killed(Exception): pass
    ready, count = make(tmp_path/'cut'), 0
    data = ready.sets('finetune', small.finetune)
    read = data.batch
    def stop(index, epoch=0):
        nonlocal count
        count += 1
        if count > 12 + 3: raise Killed
        return read(index, epoch)
    data.batch = stop
    with pytest.raises(Killed): train_preset(ready, tmp_path/'cut', progress=False)
    assert [p.name for p in (tmp_path/'cut'/'finetune').glob('checkpoint-*')] == ['checkpoint-00000002']
    again, _ = train_preset(make(tmp_path/'cut'), tmp_path/'cut', progress=False)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)
