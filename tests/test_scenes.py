"""The scenes world against a plain reading of it, one scene and one caption at a time."""
import itertools, json
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from vlwb.data.scenes import (FIELDS, RELATIONS, SENTENCES, SLOTS, SLOT_VALUES, SPLITS, SceneConfig, caption_form, captions_from_forms, captions_from_records,
                              count_matching, fits_one, form_record, hard_negative_captions, holds, make_captions, make_scenes, prevalence, relation_holds,
                              render, scene_keys, scene_records, split_of, support, wrong_facts)

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
WORLDS = [SceneConfig(), SceneConfig(max_objects=1), SceneConfig(min_objects=2, max_objects=6, repeat=.6),
          SceneConfig(shapes=('circle', 'star'), colours=('red', 'blue'), sizes=('large',), max_objects=3),
          SceneConfig(shapes=('ring',), colours=('red',), sizes=('small',), max_objects=2)]
worlds = st.sampled_from(WORLDS)
HALF_CELL = 0.235/2                                 # relations are read from centres here, from grid cells in the package

# ---- the slow reading -------------------------------------------------------------------------------------------------------
def slots(o): return dict(size=o['size'], colour=o['colour'], shape=o['shape'], side='left' if o['x'] < .5 else 'right', level='top' if o['y'] < .5 else 'bottom')
def related(relation, a, b):
    return {'left of': b['x'] - a['x'] > HALF_CELL, 'right of': a['x'] - b['x'] > HALF_CELL, 'above': b['y'] - a['y'] > HALF_CELL, 'below': a['y'] - b['y'] > HALF_CELL,
            'on the same side as': (a['x'] < .5) == (b['x'] < .5), 'on the other side from': (a['x'] < .5) != (b['x'] < .5)}[relation]
def misses(o, told): return sum(slots(o)[k] != v for k, v in told.items())
def slow_holds(objects, form):
    first, second, relation, count = (form.get(k) for k in ('first', 'second', 'relation', 'count'))
    fit = [o for o in objects if not misses(o, first or {})]
    if count: return len(fit) == count
    if second or relation:
        return any(a is not b and not misses(b, second or {}) and (not relation or related(relation, a, b)) for a in fit for b in objects)
    return bool(fit)
def slow_wrong(objects, form):
    first, second, relation, count = form.get('first', {}), form.get('second', {}), form.get('relation'), form.get('count')
    if count: return min(misses(o, first) + (sum(all(slots(p)[k] == slots(o)[k] for k in first) for p in objects) != count) for o in objects)
    if not (second or relation): return min(misses(o, first) for o in objects)
    two = [misses(a, first) + misses(b, second) + bool(relation and not related(relation, a, b)) for a, b in itertools.permutations(objects, 2)]
    one = [min(misses(o, first) + len(second), misses(o, second) + len(first)) + bool(relation) for o in objects]
    return min(two + one)
def facts(form): return len(form.get('first', {})) + len(form.get('second', {})) + ('relation' in form) + ('count' in form)

def some_slots(): return st.fixed_dictionaries({}, optional={s: st.sampled_from(SLOT_VALUES[s]) for s in SLOTS})
forms = st.one_of(
    some_slots().filter(bool).map(lambda f: dict(first=f)),
    st.builds(lambda f, n: dict(first=f, count=n), some_slots(), st.integers(1, 7)),
    st.builds(lambda f, s: dict(first=f, second=s), some_slots().filter(bool), some_slots().filter(bool)),
    st.builds(lambda f, s, r: dict(first=f, second=s, relation=r), some_slots(), some_slots(), st.sampled_from(RELATIONS)))

def check(scenes, captions):
    w, h, g, p = wrong_facts(scenes, captions), holds(scenes, captions), support(scenes, captions), prevalence(scenes, captions)
    assert w.shape == h.shape == g.shape == (len(scenes), len(captions)) and (w.dtype, h.dtype, g.dtype) == (np.int8, bool, np.float32)
    objects, plain = [r['objects'] for r in scene_records(scenes)], [form_record(f) for f in captions.form]
    slow_w = np.array([[slow_wrong(o, f) for f in plain] for o in objects]).reshape(w.shape)
    slow_h = np.array([[slow_holds(o, f) for f in plain] for o in objects], bool).reshape(h.shape)
    np.testing.assert_array_equal(w, slow_w); np.testing.assert_array_equal(h, slow_h)
    np.testing.assert_array_equal(h, w == 0)
    assert [facts(f) for f in plain] == captions.facts.tolist()
    np.testing.assert_allclose(g, 1 - slow_w/np.array([facts(f) for f in plain]), atol=1e-6)
    np.testing.assert_array_equal(p, slow_h.sum(0)); np.testing.assert_array_equal(fits_one(scenes, captions), slow_h.sum(0) == 1)

# ---- truth ------------------------------------------------------------------------------------------------------------------
@quick
@given(seeds, worlds, st.lists(forms, min_size=1, max_size=8))
def test_any_form_equals_the_slow_reading(seed, config, written):
    check(make_scenes(7, seed=seed, config=config), captions_from_forms([caption_form(**f) for f in written]))

@quick
@given(seeds, worlds)
def test_drawn_captions_equal_the_slow_reading(seed, config):
    scenes = make_scenes(6, seed=seed, config=config); captions = make_captions(scenes, per_scene=3, seed=seed)
    check(scenes, captions)
    check(make_scenes(5, seed=seed + 1, config=config), captions)
    assert holds(scenes, captions)[captions.scene, np.arange(len(captions))].all()

@pytest.mark.parametrize('n', [0, 1, 63, 64, 65, 130])
def test_bits_at_word_borders(n):
    scenes = make_scenes(n, seed=3); captions = make_captions(make_scenes(12, seed=4), seed=5)
    check(scenes, captions)
    check(scenes, captions[:0])

@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds)
def test_wrong_is_the_fewest_replacements(seed):
    "By brute force: replace facts by other values until the caption holds (scenes of two objects and more)."
    config = SceneConfig(shapes=('circle', 'star'), colours=('red', 'blue'), sizes=('small', 'large'), min_objects=2, max_objects=3)
    scenes = make_scenes(4, seed=seed, config=config); captions = make_captions(make_scenes(3, seed=seed + 1, config=config), per_scene=3, seed=seed)
    captions = captions[captions.facts <= 4]
    everything = [config.values(s).tolist() for s in SLOTS]*2 + [list(range(len(RELATIONS))), [1, 2, 3]]
    wrong = wrong_facts(scenes, captions)
    for m, form in enumerate(captions.form):
        told = np.flatnonzero(form >= 0)
        variants = np.repeat(form[None], int(np.prod([len(everything[f]) for f in told])), 0)
        variants[:,told] = list(itertools.product(*(everything[f] for f in told)))
        edits = (variants != form).sum(1)
        true = holds(scenes, captions_from_forms(variants))
        np.testing.assert_array_equal(np.where(true, edits, 99).min(1), wrong[:,m])

@quick
@given(seeds, worlds, some_slots())
def test_counting_and_relations(seed, config, told):
    scenes = make_scenes(8, seed=seed, config=config)
    counted, left = count_matching(scenes, **told), relation_holds(scenes, 'left of')
    for i, record in enumerate(scene_records(scenes)):
        assert counted[i] == sum(not misses(o, told) for o in record['objects'])
        for (a, x), (b, y) in itertools.permutations(enumerate(record['objects']), 2): assert left[i,a,b] == related('left of', x, y)

# ---- drawing ----------------------------------------------------------------------------------------------------------------
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seeds, worlds)
def test_same_seed_same_everything(seed, config):
    a, b, longer = make_scenes(20, seed=seed, config=config), make_scenes(20, seed=seed, config=config), make_scenes(30, seed=seed, config=config)
    assert scene_records(a) == scene_records(b) == scene_records(longer)[:20]
    x, y = make_captions(a, seed=seed, per_scene=2), make_captions(b, seed=seed, per_scene=2)
    assert x.records() == y.records()
    assert hard_negative_captions(a, x, seed).records() == hard_negative_captions(b, y, seed).records()
    np.testing.assert_array_equal(render(a[[3, 7]], 32), render(b, 32)[[3, 7]])

@quick
@given(seeds, seeds, worlds, worlds)
def test_splits_share_no_scene(s1, s2, c1, c2):
    keys = {}
    for split, seed, config in (('train', s1, c1), ('val', s2, c2), ('test', s1, c2)):
        try: scenes = make_scenes(60, seed=seed, config=config, split=split)
        except ValueError: continue                 # a world this small may have no scene in a split
        assert set(split_of(scenes)) == {split}
        keys[split] = set(scene_keys(scenes).tolist())
    for a, b in itertools.combinations(keys.values(), 2): assert not a & b

def test_keys_are_content():
    "Equal keys exactly where objects and grid cells are equal, whatever the order, jitter and look."
    scenes = make_scenes(3000, seed=0, config=SceneConfig(shapes=('circle', 'star'), colours=('red', 'blue'), sizes=('large',), max_objects=2))
    column, row = scenes.cell
    content = [frozenset(zip(*(v[i][scenes.mask[i]].tolist() for v in (scenes.size, scenes.colour, scenes.shape, column, row)))) for i in range(3000)]
    keys = scene_keys(scenes).tolist()
    assert len(set(keys)) == len(set(content)) == len(set(zip(keys, content))) < 3000
    shares = np.array([(split_of(make_scenes(4000, seed=1)) == s).mean() for s in SPLITS])
    np.testing.assert_allclose(shares, [.8, .1, .1], atol=.03)

@quick
@given(seeds, worlds)
def test_objects_keep_clear_of_each_other_and_of_ambiguity(seed, config):
    for record in scene_records(make_scenes(40, seed=seed, config=config)):
        for o in record['objects']: assert .1 < o['x'] < .9 and .1 < o['y'] < .9 and min(abs(o['x'] - .5), abs(o['y'] - .5)) > .08
        for a, b in itertools.combinations(record['objects'], 2):
            assert np.hypot(a['x'] - b['x'], a['y'] - b['y']) > sum(dict(small=.066, large=.105)[o['size']] for o in (a, b))
            for d in (abs(a['x'] - b['x']), abs(a['y'] - b['y'])): assert d < .07 or d > .17

# ---- captions ---------------------------------------------------------------------------------------------------------------
@quick
@given(seeds, worlds)
def test_hard_negatives_have_exactly_one_wrong_fact(seed, config):
    scenes = make_scenes(8, seed=seed, config=config); captions = make_captions(scenes, seed=seed, per_scene=3)
    hard = hard_negative_captions(scenes, captions, seed)
    assert ((hard.form != captions.form[hard.source]).sum(1) == 1).all()
    np.testing.assert_array_equal(hard.scene, captions.scene[hard.source])
    records = scene_records(scenes)
    for f, i, kind, source in zip(hard.form, hard.scene, hard.kind, hard.source):
        objects, form, before = records[i]['objects'], form_record(f), form_record(captions.form[source])
        assert not slow_holds(objects, form) and slow_wrong(objects, form) == 1 and slow_holds(objects, before)
        field = FIELDS[int(np.flatnonzero(f != captions.form[source])[0])].rstrip('2')
        assert kind == dict(side='position', level='position').get(field, field)
    assert [a != captions.text[s] for a, s in zip(hard.text, hard.source)] == [True]*len(hard)

@settings(max_examples=12, deadline=None, derandomize=True)
@given(seeds, st.floats(.012, .25), st.sampled_from([None, ('object', 'count')]))
def test_the_knob_hits_its_target(seed, target, sentences):
    scenes = make_scenes(200, seed=seed)
    more = {} if sentences is None else dict(sentences=sentences)
    captions = make_captions(scenes, per_scene=3, seed=seed, false_negative_share=target, **more)
    others = (holds(scenes, captions).sum(0) - 1)/(len(scenes) - 1)
    assert abs(others.mean() - target) < 2e-3
    assert len(set(captions.text)) > len(captions)/4 and holds(scenes, captions)[captions.scene, np.arange(len(captions))].all()

def test_the_knob_names_its_range():
    scenes = make_scenes(100)
    with pytest.raises(ValueError, match=r'false_negative_share=0\.9 .* it can be 0\.0\d+ to 0\.\d+'): make_captions(scenes, false_negative_share=.9)

@quick
@given(seeds, worlds)
def test_records_come_back(seed, config):
    scenes = make_scenes(5, seed=seed, config=config); captions = make_captions(scenes, seed=seed)
    for c in (captions, hard_negative_captions(scenes, captions)):
        back = captions_from_records(json.loads(json.dumps(c.records())))
        assert back.records() == c.records() and (back.form == c.form).all() and back.form.shape[1] == 12

@quick
@given(seeds)
def test_words_say_what_the_form_says(seed):
    "Every told value is heard in the text, in one of its words; nothing else is."
    words = dict(circle='circle disc', square='square box', cross='cross plus', ring='ring hoop', diamond='diamond rhombus', crescent='crescent moon', small='small little',
                 large='large big', purple='purple violet', top='upper top higher', bottom='lower bottom', left='left', right='right')
    captions = make_captions(make_scenes(10, seed=seed), seed=seed)
    for text, form in zip(captions.text, captions.form):
        told, heard = form_record(form), text.replace('crosses', 'cross').replace('boxes', 'box').replace('rhombuses', 'rhombus').split()
        heard = {w[:-1] if w.endswith('s') and w not in ('cross', 'plus', 'rhombus') else w for w in heard}
        values = [*told.get('first', {}).values(), *told.get('second', {}).values()]
        for v in values: assert heard & set(words.get(v, v).split()), (text, told)
        for slot in ('size', 'colour', 'shape'):
            for v in SLOT_VALUES[slot]:
                if v not in values: assert not heard & set(words.get(v, v).split()), (text, told)
        if 'count' in told: assert heard & {'one two three four'.split()[told['count'] - 1]}
