"OSCAR against an independent reading in plain torch, its checkpoints in their own naming, and what the model promises to objectives: padding, precision, gradients, errors."
import dataclasses, json, math, pickle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb.core import DataError, make_generator, seed_everything
from vlwb.data.inputs import TensorSet, WordTokenizer
from vlwb.losses.infonce import infonce
from vlwb.losses.queue import momentum_copy
from vlwb.models.dual import DualEncoder
from vlwb.models.oscar import OscarConfig, OscarModel, infer_oscar_config, load_oscar, official_settings, official_state_dict, oscar_base, oscar_images, oscar_tiny, save_oscar

WORDS, LENGTH, WIDTH, INNER, LAYERS, HEADS, REGION = 50, 24, 32, 48, 3, 4, 14
SPECIAL = dict(heads=HEADS, special_tokens=(0,2,3))


def official_shapes(norm=True, head='linear', pretraining=False):
    "Every name of a public checkpoint with tiny shapes, written down from the published naming (not from the package)."
    e = 'bert.embeddings'
    s = {f'{e}.word_embeddings.weight': (WORDS, WIDTH), f'{e}.position_embeddings.weight': (LENGTH, WIDTH), f'{e}.token_type_embeddings.weight': (2, WIDTH), f'{e}.LayerNorm.weight': (WIDTH,), f'{e}.LayerNorm.bias': (WIDTH,)}
    for i in range(LAYERS):
        l = f'bert.encoder.layer.{i}'
        for part, (out, into) in {'attention.self.query': (WIDTH, WIDTH), 'attention.self.key': (WIDTH, WIDTH), 'attention.self.value': (WIDTH, WIDTH), 'attention.output.dense': (WIDTH, WIDTH),
                                  'intermediate.dense': (INNER, WIDTH), 'output.dense': (WIDTH, INNER)}.items(): s |= {f'{l}.{part}.weight': (out, into), f'{l}.{part}.bias': (out,)}
        for part in ('attention.output.LayerNorm', 'output.LayerNorm'): s |= {f'{l}.{part}.weight': (WIDTH,), f'{l}.{part}.bias': (WIDTH,)}
    s |= {'bert.pooler.dense.weight': (WIDTH, WIDTH), 'bert.pooler.dense.bias': (WIDTH,), 'bert.img_embedding.weight': (WIDTH, REGION), 'bert.img_embedding.bias': (WIDTH,)}
    if norm: s |= {'bert.LayerNorm.weight': (WIDTH,), 'bert.LayerNorm.bias': (WIDTH,)}
    if pretraining:
        p = 'cls.predictions'
        s |= {f'{p}.bias': (WORDS,), f'{p}.transform.dense.weight': (WIDTH, WIDTH), f'{p}.transform.dense.bias': (WIDTH,), f'{p}.transform.LayerNorm.weight': (WIDTH,), f'{p}.transform.LayerNorm.bias': (WIDTH,),
              f'{p}.decoder.weight': (WORDS, WIDTH), 'cls.seq_relationship.weight': (3, WIDTH), 'cls.seq_relationship.bias': (3,)}
    elif head == 'linear': s |= {'classifier.weight': (2, WIDTH), 'classifier.bias': (2,)}
    else: s |= {'classifier.0.weight': (3*WIDTH, WIDTH), 'classifier.0.bias': (3*WIDTH,), 'classifier.2.weight': (2, 3*WIDTH), 'classifier.2.bias': (2,)}
    return s


def official(seed=0, **kinds):
    "A checkpoint with weights large enough that attention is far from uniform and every tensor matters."
    g, s = make_generator(seed), {}
    for name, shape in official_shapes(**kinds).items():
        if 'LayerNorm' in name and name.endswith('weight'): s[name] = 1 + 0.3*torch.randn(shape, generator=g)
        elif 'embeddings' in name and len(shape) > 1: s[name] = torch.randn(shape, generator=g)
        elif len(shape) > 1: s[name] = torch.randn(shape, generator=g)*1.5/math.sqrt(shape[1])
        else: s[name] = 0.3*torch.randn(shape, generator=g)
    return s


class Reading:
    "OSCAR as its paper and its public code describe it, one pair at a time and without padding: linear maps, LayerNorms and softmax on tensors taken by name."
    def __init__(self, state): self.s = state

    def linear(self, name, x): return x @ self.s[f'{name}.weight'].T + self.s[f'{name}.bias']

    def norm(self, name, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean)/((x - mean)**2).mean(-1, keepdim=True).add(1e-12).sqrt()*self.s[f'{name}.weight'] + self.s[f'{name}.bias']

    def words(self, ids, types):
        e = 'bert.embeddings'
        x = self.s[f'{e}.word_embeddings.weight'][ids] + self.s[f'{e}.position_embeddings.weight'][:len(ids)] + self.s[f'{e}.token_type_embeddings.weight'][types]
        return self.norm(f'{e}.LayerNorm', x)

    def states(self, caption, tags=(), regions=None):
        "Last states (L,W) of [CLS] caption [SEP] tags [SEP] regions; lists of ids with their [SEP]."
        x = self.words(torch.tensor([*caption, *tags]), torch.tensor([0]*len(caption) + [1]*len(tags)))
        if regions is not None and len(regions):
            r = self.linear('bert.img_embedding', regions)
            x = torch.cat([x, self.norm('bert.LayerNorm', r) if 'bert.LayerNorm.weight' in self.s else r])
        d = WIDTH//HEADS
        for i in range(LAYERS):
            l = f'bert.encoder.layer.{i}'
            q, k, v = (self.linear(f'{l}.attention.self.{n}', x) for n in ('query', 'key', 'value'))
            seen = torch.cat([(q[:,h:h+d] @ k[:,h:h+d].T/math.sqrt(d)).softmax(-1) @ v[:,h:h+d] for h in range(0, WIDTH, d)], 1)
            x = self.norm(f'{l}.attention.output.LayerNorm', self.linear(f'{l}.attention.output.dense', seen) + x)
            inner = self.linear(f'{l}.intermediate.dense', x)
            inner = inner*0.5*(1 + torch.erf(inner/math.sqrt(2)))
            x = self.norm(f'{l}.output.LayerNorm', self.linear(f'{l}.output.dense', inner) + x)
        return x

    def pooled(self, x, how='pooler'):
        return x[0] if how == 'cls' else x.mean(0) if how == 'mean' else torch.tanh(self.linear('bert.pooler.dense', x[0]))

    def match(self, *sequence):
        x = self.pooled(self.states(*sequence))
        return self.linear('classifier', x) if 'classifier.weight' in self.s else self.linear('classifier.2', self.linear('classifier.0', x).clamp(min=0))


CAPTIONS, TAGS = [[2,5,6,7,3], [2,8,3], [2,9,5,3]], [[20,21,22,3], [23,3], []]
COUNTS = 4, 2, 0


def padded(extra=0, fill=0., seed=3):
    "The three pairs as one padded batch."
    regions = torch.randn(3, 4, REGION, generator=make_generator(seed))
    wide, tag_wide = 5 + extra, 4 + extra
    ids = torch.tensor([c + [0]*(wide - len(c)) for c in CAPTIONS])
    tags = torch.tensor([t + [0]*(tag_wide - len(t)) for t in TAGS])
    mask = torch.arange(4 + extra) < torch.tensor(COUNTS)[:,None]
    regions = torch.cat([regions, torch.zeros(3, extra, REGION)], 1).masked_fill(~mask[...,None], fill)
    return dict(regions=regions, region_mask=mask, tag_ids=tags, tag_mask=(tags != 0).long()), dict(input_ids=ids, attention_mask=(ids != 0).long())


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('head', ['linear', 'mlp'])
@pytest.mark.parametrize('extra', [0, 3])
def test_joint_pass_equals_the_reading(norm, head, extra):
    state = official(norm=norm, head=head)
    model, report = load_oscar(state, **SPECIAL)
    assert set(report.loaded) == set(state) and not report.unexpected and model.config.region_norm == norm and model.config.classifier == head
    images, texts = padded(extra)
    read, i = Reading(state), torch.tensor([0,0,0,1,1,1,2,2,2])
    j = torch.tensor([0,1,2]*3)
    expected = torch.stack([read.match(CAPTIONS[b], TAGS[a], images['regions'][a,:COUNTS[a]]) for a, b in zip(i.tolist(), j.tolist())])
    with torch.no_grad():
        assert_close(model.match_logits(images, texts, i, j), expected, atol=1e-5, rtol=1e-5)
        assert_close(model.match_logits(images, texts), expected[[0,4,8]], atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize('pooling', ['pooler', 'cls', 'mean'])
@pytest.mark.parametrize('tags_with', ['image', 'none'])
def test_separate_passes_equal_the_reading(pooling, tags_with):
    state = official()
    config = dataclasses.replace(infer_oscar_config(state, **SPECIAL), pooling=pooling, tags_with=tags_with, projection_dim=None)
    model = load_oscar(state, config).model
    images, texts = padded(2)
    read = Reading(state)
    with torch.no_grad(): out = model(images, texts)
    for b in range(3):
        seen = read.states([2,3], TAGS[b] if tags_with == 'image' else [], images['regions'][b,:COUNTS[b]])
        assert_close(out.image_features[b], F.normalize(read.pooled(seen, pooling), dim=0), atol=1e-5, rtol=1e-5)
        assert_close(out.text_features[b], F.normalize(read.pooled(read.states(CAPTIONS[b]), pooling), dim=0), atol=1e-5, rtol=1e-5)


def test_projections_follow_the_pooled_states():
    state = official()
    model = load_oscar(state, **SPECIAL).model
    images, texts = padded()
    seen = torch.stack([Reading(state).pooled(Reading(state).states([2,3], TAGS[b], images['regions'][b,:COUNTS[b]])) for b in range(3)])
    with torch.no_grad(): assert_close(model.encode_image(images), F.normalize(seen @ model.image_projection.weight.T, dim=1), atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(extra=st.integers(0, 6), fill=st.sampled_from([0., 7., float('nan'), float('inf')]), seed=st.integers(0, 5))
def test_padding_changes_nothing(extra, fill, seed):
    model = load_oscar(official(), **SPECIAL).model
    with torch.no_grad():
        a, b = (dict(zip(('v', 't', 's'), model(*padded(e, f, seed)))) | dict(m=model.match_logits(*padded(e, f, seed))) for e, f in ((0, 0.), (extra, fill)))
    for name in a: assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


def test_masked_nan_reaches_no_gradient():
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded(2, float('nan'))
    (infonce(*model(images, texts)) + model.match_logits(images, texts).sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters()) and model.bert.img_embedding.weight.grad.abs().sum() > 0


def test_tags_as_the_tokeniser_gives_them():
    "A leading [CLS] and the [SEP] of an image without tags are hidden; no mask means all but padding."
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded()
    raw = dict(images, tag_ids=torch.tensor([[2,20,21,22,3], [2,23,3,0,0], [2,3,0,0,0]])); del raw['tag_mask']
    with torch.no_grad():
        assert_close(model.match_logits(raw, texts), model.match_logits(images, texts), atol=1e-5, rtol=1e-5)
        assert_close(model.encode_image(raw), model.encode_image(images), atol=1e-5, rtol=1e-5)
        no_mask = {'input_ids': texts['input_ids']}
        assert_close(model.encode_text(no_mask), model.encode_text(texts), atol=0, rtol=0)


def test_one_pair_duplicates_and_nothing_to_see():
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded()
    one = lambda x, i: {k: v[[i]] for k, v in x.items()}
    with torch.no_grad():
        whole = model.match_logits(images, texts)
        for i in range(3): assert_close(model.match_logits(one(images, i), one(texts, i)), whole[[i]], atol=1e-5, rtol=1e-5)
        twice = model.match_logits(images, texts, [1,1], [0,0])
        assert_close(twice[0], twice[1])
        assert model.match_logits(images, texts, [], []).shape == (0,2)
        blind = dict(regions=torch.full((2,3,REGION), float('nan')), region_mask=torch.zeros(2,3))
        empty = dict(input_ids=torch.zeros(2,4, dtype=torch.long), attention_mask=torch.zeros(2,4))
        out = model(blind, empty)
        for x in (*out[:2], model.match_logits(blind, empty), model.encode_image(torch.zeros(2,0,REGION))): assert torch.isfinite(x).all()
        assert_close(out.image_features[0], out.image_features[1])


def test_grid_features_become_cells():
    seed_everything(0)
    model = OscarModel(oscar_tiny).eval()
    flat = torch.randn(2, 32*16, generator=make_generator(0))
    cells = flat.view(2, 32, 16).transpose(1, 2)
    boxes = torch.tensor([[c/4, r/4, c/4 + .25, r/4 + .25, .25, .25] for r in range(4) for c in range(4)])
    with torch.no_grad():
        by_hand = model.encode_image(torch.cat([cells, boxes.expand(2, -1, -1)], 2))
        assert_close(model.encode_image(flat), by_hand); assert_close(model.encode_image(flat.view(2,32,4,4)), by_hand); assert_close(model.encode_image(dict(regions=flat)), by_hand)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded()
    with torch.no_grad():
        whole = model(images, texts)
        stored = model(dict(images, regions=images['regions'].half()), texts)                # a store in float16 feeds a float32 model
        assert_close(stored.image_features, whole.image_features, atol=1e-2, rtol=0)
        with torch.autocast('cpu', dtype): auto = model(images, texts)
        short = model.to(dtype)(images, texts)
    for out in (auto, short):
        for side in out[:2]: assert side.dtype == torch.float32; assert_close(side.norm(dim=1), torch.ones(3))
        assert (out.image_features*whole.image_features).sum(1).min() > 0.98 and (out.text_features*whole.text_features).sum(1).min() > 0.98


def test_gradients_in_float64():
    config = OscarConfig(vocab_size=12, width=8, layers=1, heads=2, intermediate=8, max_length=8, region_dim=7, grid_side=0, projection_dim=3)
    seed_everything(0)
    model = OscarModel(config).double().eval()
    regions = torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    mask, tags = torch.tensor([[1,1],[1,0]]), torch.tensor([[7,3],[0,0]])
    texts = dict(input_ids=torch.tensor([[2,5,3],[2,6,3]]))
    images = lambda r: dict(regions=r, region_mask=mask, tag_ids=tags)
    assert torch.autograd.gradcheck(lambda r: (model.encode_image(images(r)), model.match_logits(images(r), texts, [0,1,1], [0,0,1])), (regions,))
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(model, {'bert.img_embedding.weight': w}, (images(regions.detach()), texts)).image_features, (model.bert.img_embedding.weight.detach().requires_grad_(),))


def test_every_parameter_learns():
    seed_everything(0)
    model = OscarModel(dataclasses.replace(oscar_tiny, layers=1, logit_bias=-1.))
    images, texts = torch.randn(3, 512), dict(input_ids=torch.tensor([[2,5,3],[2,6,3],[2,7,3]]))
    out = model(images, texts)
    (infonce(*out) + F.cross_entropy(model.match_logits(images, texts), torch.tensor([1,0,1])) + model.logit_bias).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    vision = [n for n, _ in model.named_parameters() if n.startswith(model.vision_parts)]
    assert sorted(vision) == ['bert.LayerNorm.bias', 'bert.LayerNorm.weight', 'bert.img_embedding.bias', 'bert.img_embedding.weight', 'image_projection.weight']
    copy = momentum_copy(model)
    with torch.no_grad(): assert_close(copy(images, texts).image_features, out.image_features.detach())


def test_scale_is_clamped_and_can_be_frozen():
    model = OscarModel(dataclasses.replace(oscar_tiny, layers=1, learn_scale=False, temperature=0.5))
    assert_close(model.logit_scale, torch.tensor(2.)); assert not model.log_logit_scale.requires_grad
    with torch.no_grad(): model.log_logit_scale.fill_(9.)
    model.clamp_scale_(); assert_close(model.logit_scale, torch.tensor(100.))


def test_dropout_is_drawn_for_each_pair():
    seed_everything(0)
    model = OscarModel(dataclasses.replace(oscar_tiny, dropout=0.3, grid_side=0)).train()
    regions, texts = torch.randn(1,3,38), dict(input_ids=torch.tensor([[2,5,3]]))
    twice = model.match_logits(regions, texts, [0,0], [0,0])
    assert (twice[0] - twice[1]).abs().max() > 1e-3
    assert_close(*model.eval().match_logits(regions, texts, [0,0], [0,0]))


# checkpoints

def test_pretrained_heads_and_other_tasks_are_reported():
    state = official(pretraining=True)
    model, report = load_oscar(state, **SPECIAL)
    assert set(report.unexpected) == {k for k in state if k.startswith('cls.')} and {'classifier.weight', 'classifier.bias', 'image_projection.weight'} <= set(report.missing)
    answers = official() | {'classifier.weight': torch.zeros(9, WIDTH), 'classifier.bias': torch.zeros(9)}
    report = load_oscar(answers, **SPECIAL).report
    assert report.skipped == (f'classifier.weight (9, {WIDTH})', 'classifier.bias (9,)') and 'classifier.weight' in report.missing
    mlp = official(head='mlp') | {'classifier.2.weight': torch.zeros(9, 3*WIDTH), 'classifier.2.bias': torch.zeros(9)}
    model, report = load_oscar(mlp, **SPECIAL)
    assert len(report.skipped) == 4 and model.config.classifier == 'linear'


def test_names_of_other_times():
    "Wrapped, bare and old names, and the buffer of later BERTs, give the same model."
    state, (images, texts) = official(), padded()
    forms = [{f'module.{k}': x for k, x in state.items()}, {k.removeprefix('bert.'): x for k, x in state.items()}, state | {'bert.embeddings.position_ids': torch.arange(LENGTH)[None]},
             {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): x for k, x in state.items()}]
    with torch.no_grad():
        expected = load_oscar(state, **SPECIAL).model.match_logits(images, texts)
        for form in forms:
            model, report = load_oscar(form, **SPECIAL)
            assert not report.unexpected; assert_close(model.match_logits(images, texts), expected, rtol=0, atol=0)


@pytest.mark.parametrize('head,norm', [('linear', True), ('mlp', False)])
def test_there_and_back(tmp_path, head, norm):
    from safetensors.torch import save_file
    state = official(head=head, norm=norm)
    model = load_oscar(state, **SPECIAL).model
    again = official_state_dict(model)
    assert set(again) == set(state)
    for k in state: assert_close(again[k], state[k], rtol=0, atol=0)
    back = load_oscar(save_oscar(tmp_path/'folder', model))
    assert back.model.config == model.config and not back.report.unexpected
    torch.save(state, tmp_path/'x.pth'); save_file(state, str(tmp_path/'x.safetensors'))
    for name in ('x.pth', 'x.safetensors', 'folder/pytorch_model.bin'):
        for k, x in official_state_dict(load_oscar(tmp_path/name, **SPECIAL).model).items(): assert_close(x, state[k], rtol=0, atol=0)
    settings_ = json.loads((tmp_path/'folder'/'config.json').read_text())
    assert (settings_['img_feature_dim'], settings_['classifier'], settings_['use_img_layernorm'], settings_['num_labels']) == (REGION, head, int(norm), 2)
    whole = load_oscar(model.state_dict(), model.config)
    assert not whole.report.missing and not whole.report.unexpected


def test_own_form(tmp_path):
    model = OscarModel(dataclasses.replace(oscar_tiny, layers=1)).eval()
    back = OscarModel.from_pretrained(model.save_pretrained(tmp_path/'a'))
    assert back.config == model.config and not back.training
    for a, b in zip(model.state_dict().values(), back.state_dict().values()): assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(DataError, match='config.json is missing'): OscarModel.from_pretrained(tmp_path)
    with pytest.raises(DataError, match='another kind of model'): OscarModel.from_pretrained(DualEncoder().save_pretrained(tmp_path/'b'))
    with pytest.raises(DataError, match='another kind of model'): DualEncoder.from_pretrained(tmp_path/'a')
    config = json.loads((tmp_path/'a'/'config.json').read_text())
    (tmp_path/'a'/'config.json').write_text(json.dumps(config | dict(width=32)))
    with pytest.raises(DataError, match='not those of the configuration'): OscarModel.from_pretrained(tmp_path/'a')
    (tmp_path/'a'/'config.json').write_text('{"width": 3')
    with pytest.raises(DataError, match='no whole JSON'): OscarModel.from_pretrained(tmp_path/'a')


class Evil:
    def __reduce__(self): return (exec, ('raise SystemExit("code from the file ran")',))


def test_what_a_checkpoint_may_not_be(tmp_path):
    state = official()
    with pytest.raises(DataError, match='pass heads='): load_oscar(state, special_tokens=(0,2,3))
    with pytest.raises(ValueError, match='below vocab_size'): load_oscar(state, heads=HEADS)
    with pytest.raises(DataError, match='pass region_dim'): load_oscar({k: x for k, x in state.items() if 'img_embedding' not in k}, **SPECIAL)
    with pytest.raises(DataError, match='missing among 1 tensors'): load_oscar({'a': torch.zeros(2)})
    with pytest.raises(DataError, match='none of its 1 tensors'): load_oscar({'a': torch.zeros(2)}, oscar_tiny)
    with pytest.raises(DataError, match='damaged'): load_oscar(state | {'bert.pooler.dense.bias': torch.full((WIDTH,), float('nan'))}, **SPECIAL)
    with pytest.raises(DataError, match='bert.pooler.dense.bias is'): load_oscar(state | {'bert.pooler.dense.bias': torch.zeros(3)}, **SPECIAL)
    with pytest.raises(ValueError, match='in config already'): load_oscar(state, oscar_tiny, heads=4)
    with pytest.raises(DataError, match="hidden_act must be 'gelu'"): infer_oscar_config(state, dict(hidden_act='relu'), **SPECIAL)
    with pytest.raises(DataError, match='not there'): load_oscar(tmp_path/'none.bin')
    with pytest.raises(DataError, match='holds no checkpoint'): load_oscar(tmp_path)
    (tmp_path/'evil.bin').write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(DataError): load_oscar(tmp_path/'evil.bin')
    torch.save(Evil(), tmp_path/'evil.pth')
    with pytest.raises(DataError, match='would run code'): load_oscar(tmp_path/'evil.pth')


def test_settings_decide_what_tensors_cannot():
    state = official(norm=False)
    config = infer_oscar_config(state, dict(num_attention_heads=8, hidden_dropout_prob=0.3, img_layer_norm_eps=1e-5, cls_token_id=5, sep_token_id=6))
    assert (config.heads, config.dropout, config.region_norm, config.region_norm_eps, config.cls_token_id) == (8, 0.3, False, 1e-5, 5)
    assert infer_oscar_config({k: x for k, x in state.items() if 'img_embedding' not in k}, dict(use_img_layernorm=1), region_dim=2054, **SPECIAL).region_norm
    assert official_settings(oscar_base)['img_feature_dim'] == 2054


def test_base_size_by_names():
    with torch.device('meta'): state = official_state_dict(OscarModel(oscar_base))
    tiny = official_shapes()
    names = {k.replace('layer.0', f'layer.{i}') for k in tiny if 'layer.0' in k for i in range(12)} | {k for k in tiny if 'encoder' not in k}
    assert set(state) == names
    assert state['bert.img_embedding.weight'].shape == (768,2054) and state['bert.embeddings.word_embeddings.weight'].shape == (30522,768) and state['bert.encoder.layer.11.intermediate.dense.weight'].shape == (3072,768)
    assert infer_oscar_config(state) == dataclasses.replace(oscar_base, intermediate=3072)
    with torch.device('meta'): assert OscarModel(oscar_base).match_logits(torch.rand(2,50,2054), dict(input_ids=torch.zeros(2,35, dtype=torch.long))).shape == (2,2)


@pytest.mark.parametrize('change,message', [(dict(regions=torch.zeros(3,4,9)), r'regions must be \(B,R,14\)'), (dict(region_mask=torch.ones(3,9)), 'region_mask must be'), (dict(tag_mask=torch.ones(3,9)), 'tag_mask must be'),
    (dict(tag_ids=torch.zeros(2,4, dtype=torch.long)), 'a row for each of the 3 images'), (dict(tag_ids=None), 'without tag_ids'), (dict(boxes=torch.zeros(1)), 'got a dict of'), (dict(tag_ids=torch.ones(3,40, dtype=torch.long), tag_mask=None), 'truncate them')])
def test_images_that_do_not_fit(change, message):
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded()
    with pytest.raises(ValueError, match=message): model.match_logits(images | change, texts)


def test_numbers_that_no_feature_or_word_has():
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded()
    broken = images['regions'].clone(); broken[1, 0, 3] = float('nan')
    with pytest.raises(ValueError, match=r'regions \(3, \d+, 14\) hold NaN or infinity, first in image 1, region 0; mask it'): model.encode_image(images | dict(regions=broken))
    assert torch.isfinite(model.encode_image(images | dict(regions=broken, region_mask=torch.zeros(broken.shape[:2])))).all()
    words = model.config.vocab_size
    for ids in (torch.full((2, 4), words), torch.tensor([[1, -1]])):
        with pytest.raises(ValueError, match=f'knows {words} words: take the tokeniser'): model.encode_text(dict(input_ids=ids))
    with pytest.raises(ValueError, match=f'to {words} and the model knows'): model.encode_image(images | dict(tag_ids=torch.full((3, 2), words), tag_mask=None))
    for tags in (torch.ones(3, 4), [[1, 2]]*3):
        with pytest.raises(ValueError, match='tag_ids must be a whole-number tensor'): model.encode_image(images | dict(tag_ids=tags))


def test_configurations_and_pairs_that_do_not_fit():
    for bad, message in ((dict(pooling='max'), 'pooling must be'), (dict(tags_with='text'), 'tags_with'), (dict(classifier='deep'), 'classifier'), (dict(heads=5), 'multiple of heads'), (dict(heads=0), 'multiple of heads'),
                         (dict(temperature=0.), 'positive'), (dict(vocab_size=3), 'below vocab_size'), (dict(sep_token_id=2), 'different ids')):
        with pytest.raises(ValueError, match=message): OscarConfig(**bad)
    model = load_oscar(official(), **SPECIAL).model
    images, texts = padded()
    for i, j in (([0,1], [0]), ([[0]], [[0]]), (None, [0])):
        with pytest.raises(ValueError, match='as many images as captions'): model.match_logits(images, texts, i, j)
    with pytest.raises(ValueError, match='attention_mask must be'): model.encode_text(dict(texts, attention_mask=torch.ones(1,2)))
    with pytest.raises(ValueError, match='input_ids must be'): model.encode_text(dict(input_ids=torch.ones(3, dtype=torch.long)))


def test_the_loop_on_grid_features(tmp_path):
    "Grid features, the loop and its objective as they are, and a matching loss beside it."
    from vlwb.train.loop import Batches, TrainConfig, train
    from vlwb.train.objectives import LossConfig, Objective, encode_set
    names = ['red', 'blue', 'green', 'white', 'black', 'pink']
    words = WordTokenizer.learn(names)
    g = make_generator(0)
    what = torch.randint(6, (120, 2), generator=g)
    grid = torch.zeros(120, 8, 2, 2)
    grid[torch.arange(120), what[:,0], 0, 0], grid[torch.arange(120), what[:,1], 1, 1] = 2., 2.
    data = TensorSet(grid.flatten(1) + 0.05*torch.randn(120, 32, generator=g), words([f'{names[a]} {names[b]}' for a, b in what.tolist()]), torch.arange(120))
    seed_everything(0)
    model = OscarModel(OscarConfig(vocab_size=words.vocab_size, width=32, layers=2, heads=2, region_dim=14, grid_side=2, projection_dim=16, pooling='mean'))
    objective = Objective(LossConfig(), 60)

    def both(model, batch, step):
        contrast, stats = objective(model, batch, step)
        i = torch.arange(len(batch))
        other = i.roll(1)
        wrong = (what[batch.image_ids] != what[batch.image_ids[other]]).any(1)
        logits = model.match_logits(batch.images, batch.texts, torch.cat([i, i[wrong]]), torch.cat([i, other[wrong]]))
        matching = F.cross_entropy(logits, (torch.arange(len(logits)) < len(i)).long())
        return contrast + matching, dict(stats, contrast=contrast.item(), matching=matching.item())
    log = train(model, Batches(data, 24, seed=0), both, TrainConfig(steps=120, lr=3e-3, device='cpu', log_every=1), folder=tmp_path, progress=False)
    mean = lambda part, name: sum(r[name] for r in part)/len(part)
    assert mean(log[-10:], 'contrast') < mean(log[:5], 'contrast') - 1 and mean(log[-10:], 'matching') < mean(log[:5], 'matching') - 0.1
    features = encode_set(model, data)
    assert features.images.shape == (120,16) and torch.isfinite(features.texts).all()


def test_the_loop_on_a_region_set(tmp_path):
    "A store in float16 with images of different length, tags, and images without any: what a detector's output gives, through the loop as it is."
    from vlwb.data.pairs import Pairs
    from vlwb.data.regions import RegionPairs, Regions, write_store
    from vlwb.train.loop import Batches, TrainConfig, train
    from vlwb.train.objectives import LossConfig, Objective, encode_set
    names = ['red', 'blue', 'green', 'white', 'black', 'pink']
    words, g = WordTokenizer.learn(names), make_generator(0)
    what = [torch.randperm(6, generator=g)[:1 + i % 3].tolist() for i in range(90)]
    boxes = torch.tensor([[0., 0, 20, 40], [20, 0, 60, 40], [60, 20, 100, 50]])
    items = [(str(i), Regions(3*torch.eye(6)[w], boxes[:len(w)], 100, 50, tags=None if i % 5 == 0 else [names[k] for k in w])) for i, w in enumerate(what)]
    pairs = Pairs.from_arrays(None, [' '.join(names[k] for k in w) for w in what], list(range(90)), image_ids=[i for i, _ in items])
    data = RegionPairs(pairs, write_store(tmp_path/'store', items), words, tags=True)
    seed_everything(0)
    model = OscarModel(OscarConfig(vocab_size=words.vocab_size, width=32, layers=2, heads=2, region_dim=12, grid_side=0, projection_dim=16))
    objective = Objective(LossConfig(), 60)

    def both(model, batch, step):
        contrast, _ = objective(model, batch, step)
        n = len(batch)
        i = torch.arange(n)
        matching = F.cross_entropy(model.match_logits(batch.images, batch.texts, torch.cat([i, i]), torch.cat([i, i.roll(1)])), (torch.arange(2*n) < n).long())
        return contrast + matching, dict(contrast=contrast.item(), matching=matching.item())
    log = train(model, Batches(data, 18, seed=0), both, TrainConfig(steps=100, lr=3e-3, device='cpu', log_every=1), progress=False)
    mean = lambda part, name: sum(r[name] for r in part)/len(part)
    assert mean(log[-10:], 'contrast') < mean(log[:5], 'contrast') - 1 and mean(log[-10:], 'matching') < mean(log[:5], 'matching') - 0.1, [(r['contrast'], r['matching']) for r in log[::10]]
    assert encode_set(model, data).images.shape == (90,16)
