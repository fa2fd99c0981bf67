"Region features: every form there and back, files that are cut, changed or hostile, streams that stay small, a store that is whole or not there."
import base64, json, math, os, pickle, shutil, signal, subprocess, sys, tracemalloc
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from vlwb.core import DataError, make_generator
from vlwb.data.inputs import WordTokenizer, make_loader
from vlwb.data.pairs import Pairs
from vlwb.data.regions import RegionPairs, RegionReader, Regions, RegionStore, TsvIndex, box_geometry, geometry_order, parse_labels, region_inputs, tsv_rows, write_store
from vlwb.data.world import make_scenes
from vlwb.data.inputs import ImageTransform
from vlwb.models.regions import GridRegions, cells_with_boxes, grid_boxes, photo_regions
from vlwb.models.towers import VisionConfig, vision_tower
from vlwb.train.backbone import GridBackbone, scene_pixels

packed = lambda x: base64.b64encode(x.numpy().tobytes())
exactly = dict(rtol=0, atol=0)

def some_regions(count, width=5, seed=0, size=(640, 480)):
    g = make_generator(seed)
    a, b = torch.rand(count, 2, generator=g), torch.rand(count, 2, generator=g)
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1)*torch.tensor([*size, *size])
    return Regions(torch.randn(count, width, generator=g), boxes, *map(float, size), [f'tag {k}' for k in range(seed % 4)], torch.rand(count, generator=g))

def row(name, r, form):
    n, both = b'%d' % len(r), packed(region_inputs(r))
    objects = [{'class': 'thing', 'conf': float(s), 'rect': [float(x) for x in b], 'feature': packed(f).decode()} for s, b, f in zip(r.scores, r.boxes, r.features)]
    return [name.encode(), *{'bottom-up': [b'%d' % r.width, b'%d' % r.height, n, packed(r.boxes), packed(r.features)],
        'lxmert': [b'%d' % r.height, b'%d' % r.width, b'', packed(r.scores), b'', b'', n, packed(r.boxes), packed(r.features)],
        'captioning': [json.dumps(dict(num_boxes=len(r), features=both.decode())).encode()], 'retrieval': [n, both],
        'predictions': [json.dumps(dict(image_w=r.width, image_h=r.height, objects=objects)).encode()],
        'labels': [json.dumps([{k: v for k, v in o.items() if k != 'feature'} for o in objects]).encode()]}[form]]

FORMS = 'bottom-up', 'lxmert', 'captioning', 'retrieval', 'predictions'

def write(path, rows, end=b'\n'):
    path.write_bytes(b''.join(b'\t'.join(r) + end for r in rows)); return path

@pytest.fixture(scope='module')
def six(): return {str(k): some_regions(k, seed=k) for k in (3, 1, 5, 2, 4)}

@pytest.mark.parametrize('form', FORMS)
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_form_there_and_back(tmp_path_factory, form, count, width, seed):
    r = some_regions(count, width, seed)
    path = write(tmp_path_factory.mktemp('rows')/'a.tsv', [row('x', r, form)])
    for dim in (None, width + 6):
        (name, back), = RegionReader(path, dim=dim, sizes=dict(x=(640, 480)))
        assert name == 'x' and (back.width, back.height) == (640, 480)
        assert_close(region_inputs(back), region_inputs(r)); assert_close(back.features, r.features, **exactly); assert_close(back.boxes, r.boxes, rtol=1e-5, atol=1e-3)
        if form in ('captioning', 'retrieval'): assert_close(region_inputs(back), region_inputs(r), **exactly)      # what was published is what is read

@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=0, max_size=6), width=st.integers(1, 9), half=st.booleans())
def test_store_there_and_back(tmp_path_factory, counts, width, half):
    given = {f'image {i}': some_regions(n, width, i) for i, n in enumerate(counts)}
    store = write_store(tmp_path_factory.mktemp('s')/'store', given.items(), 'float16' if half else 'float32')
    near = dict(rtol=2**-11, atol=1e-6) if half else exactly
    assert len(store) == len(given) and len(store.rows) == sum(counts)
    for name, r in given.items():
        back = store[name]
        assert_close(region_inputs(back)[:,-6:], region_inputs(r)[:,-6:], **near); assert back.tags == r.tags and (back.width, back.height) == (640, 480)
        if len(r): assert_close(back.features, r.features, **near); assert_close(back.scores, r.scores, **exactly)
    regions, mask = store.batch(list(given)[::-1]*2, max_regions=3)
    assert mask.sum(1).tolist() == [min(3, n) for n in counts[::-1]]*2 and (regions[~mask] == 0).all() and regions.dtype == torch.float32

def test_hand_worked_values():
    assert_close(box_geometry(torch.tensor([[10.,20.,30.,60.]]), 100, 200), torch.tensor([[.1,.1,.3,.3,.2,.2]]))
    assert region_inputs(some_regions(36, 2048)).shape == (36, 2054)
    assert_close(grid_boxes(4)[6], torch.tensor([.5,.25,.75,.5,.25,.25]), **exactly)
    for size in ((640, 480), (1, 1)): assert geometry_order(region_inputs(some_regions(4, size=size))[:,-6:]) == 'wh'

def test_half_and_double_precision_files(tmp_path, six):
    r = six['3']; x = region_inputs(r)
    for kind, near in ((torch.float16, 1e-2), (torch.float64, 0)):
        path = write(tmp_path/'a.tsv', [[b'x', b'3', packed(x.to(kind))]])
        assert_close(region_inputs(RegionReader(path, dim=11)['x']), x, rtol=near, atol=near)
    with pytest.raises(DataError, match='dim is another'): list(RegionReader(path, dim=12))
    torch.save(dict(a=x.bfloat16(), b=x.half()), tmp_path/'a.pt')
    assert_close(region_inputs(dict(RegionReader(tmp_path/'a.pt'))['a']), x, rtol=1e-2, atol=1e-2)

@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_give_data_errors_and_never_wrong_regions(tmp_path_factory, data):
    "Cut anywhere, or with bytes replaced: what is read without a complaint from a cut file is what was written; everything else is a DataError."
    six = {str(k): some_regions(k, 4, seed=k) for k in (3, 1, 2)}
    path = write(tmp_path_factory.mktemp('cut')/'a.tsv', [row(k, r, data.draw(st.sampled_from(FORMS))) for k, r in six.items()])
    raw = bytearray(path.read_bytes()); cut = data.draw(st.booleans()); at = data.draw(st.integers(0, len(raw) - 1))
    if cut: del raw[at:]
    else: raw[at:at+data.draw(st.integers(1, 5))] = data.draw(st.binary(max_size=5))
    path.write_bytes(raw)
    reader = RegionReader(path, dim=10, sizes={k: (640, 480) for k in six}, on_error='skip')        # in a file of one row nothing but the width tells a cut
    if not raw:
        with pytest.raises(DataError, match='a.tsv holds no regions'): dict(reader)
        return
    for name, r in reader:
        if cut: assert_close(region_inputs(r), region_inputs(six[name]))
    try: dict(RegionReader(path, sizes={k: (640, 480) for k in six}))
    except DataError as e: assert 'a.tsv' in str(e)

HOSTILE = (b'', b'[]', b'7', b'null', b'[[[', b'['*100_000, b'{"num_boxes": 1e400, "features": ""}', b'{"num_boxes": null, "features": 5}', b'{"num_boxes": -1, "features": ""}', b'{"features": {}}', b'{"objects": 3}',
    b'{"objects": [{"class": "a", "rect": [1,2,3], "feature": ""}]}', b'{"objects": [{"class": "a", "rect": null, "feature": "AAAA"}]}', b'{"objects": [{"class": 3}]}', b'{"objects": [3]}', b'{"objects": {"a": 1}}',
    b'{"image_w": [], "image_h": 1, "objects": []}', b'{"num_boxes": 1, "features": "AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/AADAfw=="}', b'\xff\xfe')

@pytest.mark.parametrize('text', HOSTILE, ids=lambda t: t[:30].decode('latin1'))
def test_hostile_json_is_a_data_error(tmp_path, text):
    path = write(tmp_path/'a.tsv', [[b'x', text], row('y', some_regions(2), 'captioning')])
    reader = RegionReader(path, on_error='skip')
    assert [name for name, _ in reader] == ['y'] and len(reader.problems) == 1 and 'a.tsv, row 1' in reader.problems.messages[0]

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

def test_pickles_are_never_run(tmp_path):
    bomb, files = Bomb(tmp_path/'ran'), tmp_path/'files'; files.mkdir()
    torch.save(dict(features=bomb), files/'a.pt'); torch.save(bomb, files/'b.pt'); np.save(files/'c.npy', np.array([bomb], object)); np.savez(files/'d.npz', features=np.array([bomb], object))
    (files/'e.npy').write_bytes(pickle.dumps(bomb, 2)); (files/'f.npz').write_bytes(pickle.dumps(bomb, 2)); (files/'g.pt').write_bytes(pickle.dumps(bomb, 2)); torch.save(region_inputs(some_regions(2)), files/'h.pt')
    reader = RegionReader(files, on_error='skip')
    assert [name for name, _ in reader] == ['h'] and len(reader.problems) == 7
    for name in ('a.pt', 'g.pt'):
        with pytest.raises(DataError): list(RegionReader(files/name))
        with pytest.raises(DataError): RegionReader(files/'h.pt', labels=files/name)
    assert not (tmp_path/'ran').exists()

def test_paths_stay_inside(tmp_path):
    files = tmp_path/'files'; files.mkdir(); torch.save(region_inputs(some_regions(2)), files/'in.pt'); torch.save(region_inputs(some_regions(2)), tmp_path/'out.pt')
    (files/'link.pt').symlink_to(tmp_path/'out.pt'); (files/'same.pt').symlink_to(files/'in.pt')
    reader = RegionReader(files, on_error='skip')
    assert [n for n, _ in reader] == ['in', 'same'] and 'leads outside' in str(reader.problems)
    for name in ('../out', str(tmp_path/'out'), 'link'):
        with pytest.raises(DataError, match='leads outside'): reader[name]
    with pytest.raises(KeyError, match='nobody'): reader['nobody']

def test_folder_forms(tmp_path):
    r, files = some_regions(3), tmp_path/'files'; files.mkdir()
    np.savez(files/'a.npz', x=r.features.numpy(), bbox=r.boxes.numpy(), image_w=640, image_h=480, num_bbox=3, info=np.array([dict(a=1)], object))      # open-vqa's; the pickled field is not touched
    np.savez(files/'b.npz', feat=r.features.numpy(), boxes=r.boxes.numpy().astype(np.int64)); np.save(files/'c.npy', region_inputs(r).numpy().astype(np.float16)); torch.save(dict(features=region_inputs(r)), files/'d.pt')
    got = dict(RegionReader(files, sizes=dict(b=(640, 480))))
    assert sorted(got) == list('abcd') and got['d'].width == 1
    for name, near in (('a', 1e-6), ('b', 1e-2), ('c', 1e-2), ('d', 0)): assert_close(region_inputs(got[name]), region_inputs(r), rtol=near, atol=near)
    for wrong, text in ((dict(features=r.features), 'no features beside'), (dict(features=r.features, boxes=r.boxes), 'how large'), (dict(features=r.features, boxes=r.boxes, width=torch.ones(2), height=3), 'one number'),
                        (dict(features=r.features, boxes=r.boxes[:2], width=9, height=9), r'\(3,4\)'), (dict(features=['a']), 'array of numbers'), (dict(features=r.features.to_sparse()), 'array of numbers'), ([1], 'array of numbers')):
        torch.save(wrong, files/'z.pt')
        with pytest.raises(DataError, match=text): RegionReader(files)['z']
    (files/'z.pt').unlink()
    with pytest.raises(DataError, match='dim'): RegionReader(files, dim=2054)['a']

def test_labels_join_by_id(tmp_path, six):
    features = write(tmp_path/'f.tsv', [row(k, r, 'retrieval') for k, r in six.items()])
    labels = write(tmp_path/'l.tsv', [[k.encode(), json.dumps(dict(image_w=640, image_h=480, objects=[{'class': f'thing {k}'}])).encode()] for k in reversed(six)])
    for k, r in RegionReader(features, labels): assert r.tags == [f'thing {k}'] and r.width == 640; assert_close(r.boxes, six[k].boxes, rtol=1e-5, atol=1e-3)
    torch.save({int(k): [{'class': 'a'}, {'class': 'a'}] for k in six}, tmp_path/'l.pt'); assert RegionReader(features, tmp_path/'l.pt')['3'].tags == ['a', 'a']
    labels.write_bytes(labels.read_bytes().split(b'\n', 1)[1])
    reader = RegionReader(features, labels, on_error='skip')
    assert len(list(reader)) == len(six) - 1 and 'no labels for image' in str(reader.problems)
    assert parse_labels('man dog').tags == ['man dog'] and parse_labels('').tags == []

def test_files_of_other_systems(tmp_path, six):
    rows = [row(k, r, 'bottom-up') for k, r in six.items()]
    for name, start, end, last in (('crlf', [], b'\r\n', b'\r\n'), ('open', [], b'\n', b''), ('header', [b'image_id image_w image_h num_boxes boxes features'.split()], b'\n', b'\n'), ('empty lines', [[b'']], b'\n\n', b'')):
        path = write(tmp_path/f'{name}.tsv', start + rows, end)
        raw = path.read_bytes(); path.write_bytes(raw[:len(raw) - len(end)] + last)
        assert [k for k, _ in RegionReader(path)] == list(six), name
        assert_close(RegionReader(path)['2'].features, six['2'].features, **exactly)

def test_index_files(tmp_path, six):
    path = write(tmp_path/'features.tsv', [row(k, r, 'retrieval') for k, r in six.items()])
    plain = TsvIndex(path); assert len(plain) == len(six)
    (tmp_path/'features.lineidx').write_text(''.join(f'{x}\n' for x in plain.starts)); (tmp_path/'imageid2idx.json').write_text(json.dumps({k: i for i, k in enumerate(six)}))
    for k in six: assert TsvIndex(path)[k] == row(k, six[k], 'retrieval') == plain[k]
    (tmp_path/'imageid2idx.json').write_text(json.dumps({k: i for i, k in enumerate(reversed(six))}))
    with pytest.raises(DataError, match='another version'): TsvIndex(path)['3']
    (tmp_path/'imageid2idx.json').write_text(json.dumps({'3': 0})); assert TsvIndex(path)['4'][0] == b'4'      # of another number of rows: not used
    for starts in (plain.starts + 1, plain.starts[:-1], np.r_[plain.starts, 10**9], plain.starts[::-1], plain.starts[:0]):
        (tmp_path/'features.lineidx').write_text('\n'.join(map(str, starts)))
        with pytest.raises(DataError, match='another version'): [TsvIndex(path)[k] for k in six]
    (tmp_path/'features.lineidx').write_text('\n'.join(map(str, [0, int(plain.starts[1]) + 5, *plain.starts[2:]])))
    for k in list(six)[:1]:
        with pytest.raises(DataError, match='another version'): TsvIndex(path)[k]

def test_streams_hold_one_image(tmp_path):
    r = some_regions(100, 250); one = b'\t'.join(row('x', r, 'retrieval'))
    with open(tmp_path/'big.tsv', 'wb') as f:
        for k in range(150): f.write(b'%d' % k + one[1:] + b'\n')
    whole = (tmp_path/'big.tsv').stat().st_size
    for run in (lambda: sum(len(r) for _, r in RegionReader(tmp_path/'big.tsv')), lambda: len(write_store(tmp_path/'store', RegionReader(tmp_path/'big.tsv')).rows)):
        tracemalloc.start()
        try: assert run() == 150*100; assert tracemalloc.get_traced_memory()[1] < 12*len(one) < whole/10
        finally: tracemalloc.stop()
    with pytest.raises(DataError, match='longer than'): next(tsv_rows(tmp_path/'big.tsv', 1000))

def test_killed_writer_leaves_no_store(tmp_path):
    code = '''import sys, itertools, torch
from vlwb.data.regions import Regions, write_store
def endless():
    for k in itertools.count():
        if k == 500: print('writing', flush=True)
        yield str(k), Regions(torch.rand(9, 64), torch.tensor([[0., 0., 1., 1.]]*9))
write_store(sys.argv[1], endless())'''
    writer = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'store')], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == 'writing\n'
    writer.send_signal(signal.SIGKILL); writer.wait(); writer.stdout.close()
    left, = tmp_path.iterdir()
    assert left.name.startswith('.store.') and not (tmp_path/'store').exists()
    for folder in (left, tmp_path/'store'):
        with pytest.raises(DataError, match='no finished store'): RegionStore(folder)
    assert len(write_store(tmp_path/'store', [('a', some_regions(1))])) == 1

def test_damaged_stores_do_not_open(tmp_path):
    write_store(tmp_path/'whole', [(str(k), some_regions(k, seed=k)) for k in (3, 0, 2)])
    for name in [f.name for f in (tmp_path/'whole').iterdir()]:
        for harm in ('gone', 'cut', 'empty'):
            shutil.copytree(tmp_path/'whole', tmp_path/'bad')
            if harm == 'gone': (tmp_path/'bad'/name).unlink()
            else: os.truncate(tmp_path/'bad'/name, (tmp_path/'bad'/name).stat().st_size//2 if harm == 'cut' else 0)
            with pytest.raises(DataError): RegionStore(tmp_path/'bad')
            shutil.rmtree(tmp_path/'bad')

@pytest.fixture
def training(tmp_path):
    given = {f'{k}.jpg': some_regions(n, seed=k) for k, n in enumerate((4, 0, 2, 7))}
    pairs = Pairs.from_arrays(None, [f'caption {k} of a thing' for k in range(9)], [0, 0, 1, 1, 2, 2, 3, 3, 3], image_ids=[f'{k}.jpg' for k in range(4)])
    return pairs, write_store(tmp_path/'store', given.items(), 'float32'), WordTokenizer.learn([*pairs.captions, 'tag 0 1 2 3'])

def test_batches_of_pairs(training):
    pairs, store, tokenizer = training
    data = RegionPairs(pairs, store, tokenizer, max_regions=3, tags=True, tag_length=4)
    batch = data.batch([2, 8, 8, 0])
    assert batch.image_ids.tolist() == [1, 3, 3, 0] and batch.index.tolist() == [2, 8, 8, 0] and batch.texts['input_ids'].shape == (4, 7)
    assert batch.images['region_mask'].sum(1).tolist() == [0, 3, 3, 3] and batch.images['regions'].isfinite().all()              # an image without regions is all masked
    assert_close(batch.images['regions'][3], region_inputs(store['0.jpg'])[:3], **exactly)
    words = [tokenizer.decode(i[m.bool()]) for i, m in zip(batch.images['tag_ids'], batch.images['tag_mask'])]
    assert words == ['tag 0', 'tag 0 tag', 'tag 0 tag', ''] and (batch.images['tag_ids'][1,3] == tokenizer.sep_token_id).all()
    assert data.batch([2]).images['regions'].shape == (1, 0, 11) and len(data.batch([])) == 0
    moved = batch.to('cpu'); assert moved.images['regions'].shape == batch.images['regions'].shape
    assert_close(data.texts_at([8])['input_ids'], batch.texts['input_ids'][1:2]); assert data.num_images == 4 and len(data) == 9
    with pytest.raises(DataError, match="first '4.jpg'"): RegionPairs(Pairs.from_arrays(None, ['a'], [0], image_ids=['4.jpg']), store, tokenizer)

def test_workers_open_the_store_themselves(training):
    pairs, store, tokenizer = training
    data = RegionPairs(pairs, store, tokenizer, tags=True)
    assert len(pickle.dumps(store)) < 1000
    for a, b, c in zip(make_loader(data, 4, seed=3), make_loader(data, 4, seed=3, workers=1), make_loader(pickle.loads(pickle.dumps(data)), 4, seed=3), strict=True):
        for k in a.images: assert_close(a.images[k], b.images[k], **exactly); assert_close(a.images[k], c.images[k], **exactly)

def test_errors_by_message(tmp_path):
    r = some_regions(2)
    for change, text in ((dict(boxes=torch.tensor([[5.,5.,1.,9.]]*2)), 'is it x, y, w, h'), (dict(features=r.features[0]), r'\(R,D\)'), (dict(scores=torch.ones(3)), r'\(2,\)'), (dict(features=r.features*torch.nan), 'NaN'), (dict(width=-1), 'positive')):
        with pytest.raises(ValueError, match=text): Regions(**dict(vars(r), **change))
    with pytest.raises(ValueError, match="'keep' or 'recompute'"): RegionReader(tmp_path, geometry='x')
    with pytest.raises(ValueError, match="dtype must be"): write_store(tmp_path/'s', [], 'bfloat16')
    with pytest.raises(DataError, match='too large for float16'): write_store(tmp_path/'s', [('a', Regions(r.features*1e6, r.boxes, 640, 480))])
    with pytest.raises(DataError, match='comes twice'): write_store(tmp_path/'s', [('a', r), ('a', r)])
    assert not list(tmp_path.iterdir())                                                                             # a failed writer cleans up

def test_cells_are_where_the_backbone_saw_them():
    scenes = make_scenes(3, seed=0); backbone = GridBackbone(); pixels = scene_pixels(scenes)
    cells = cells_with_boxes(backbone.encode(pixels), 4)
    with torch.inference_mode(): maps = backbone.body(pixels.float().div(127.5).sub(1.))
    for r in range(4):
        for c in range(4): assert_close(cells[:,4*r + c,:32], maps[:,:,r,c]); assert_close(cells[0,4*r + c,32:36], torch.tensor([c, r, c + 1, r + 1])/4)
    assert_close(cells_with_boxes(maps.clone(), 4), cells)

@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_grids_cover_the_image_once(rows, columns):
    boxes = grid_boxes(rows, columns)
    assert_close((boxes[:,4]*boxes[:,5]).sum(), torch.tensor(1.)); assert_close(boxes[:,:2] + boxes[:,4:], boxes[:,2:4])
    assert geometry_order(boxes) == ('either' if rows == columns else 'wh') and len({(round(x, 4), round(y, 4)) for x, y in boxes[:,:2].tolist()}) == rows*columns

def test_grid_regions_keep_their_gradient_after_inference_and_on_meta():
    with torch.inference_mode(): grid_boxes(4)
    with torch.device('meta'): grid_boxes(4)
    x = torch.randn(2, 12*16, requires_grad=True); cells_with_boxes(x, 4).square().sum().backward()
    assert_close(x.grad, 2*x.detach())
    grid = GridRegions(vision_tower(VisionConfig(width=16, layers=1, heads=2))).requires_grad_(False)
    assert grid(torch.rand(1,3,32,32)).shape == (1, 16, grid.width) and not grid(torch.rand(1,3,32,32)).requires_grad


def test_order_of_width_and_height(tmp_path):
    "Six numbers in another order than was said, sizes the wrong way round, and what no box can tell."
    wide = Regions(torch.rand(2, 3), torch.tensor([[5., 5., 300., 60.], [10., 30., 600., 200.]]), 640., 300., scores=torch.ones(2))
    six = region_inputs(wide)
    other = six[:,[0, 1, 2, 3 + 0, 4, 5, 6, 8, 7]]
    for name, x in dict(right=six, other=other, none=torch.cat([six[:,:7], six[:,7:]/2], 1), square=torch.cat([torch.rand(1, 3), torch.tensor([[.1, .1, .4, .4, .3, .3]])], 1)).items(): write(tmp_path/f'{name}.tsv', [[b'7', b'%d' % len(x), packed(x)]])
    for half, name in ((six.half(), 'half'), (other.half(), 'half_other')): write(tmp_path/f'{name}.tsv', [[b'7', b'2', packed(half)]])
    read = lambda name, **kw: dict(RegionReader(tmp_path/f'{name}.tsv', **kw))['7']
    assert_close(region_inputs(read('right')), six, **exactly); assert_close(region_inputs(read('other', order='hw')), other, **exactly)
    assert_close(region_inputs(read('half', dim=9)), six, rtol=1e-2, atol=1e-3)
    for name in ('right', 'other', 'none'): assert_close(region_inputs(read(name, geometry='recompute')), six)
    for order in ('wh', 'hw'): assert read('square', order=order).geometry is not None                                       # either
    for name, kw, word in (('other', {}, "other.tsv, row 1: .*height, width; order='hw'"), ('right', dict(order='hw'), "width, height; order='wh'"), ('none', {}, "geometry='recompute'"), ('half_other', dict(dim=9), "order='hw'")):
        with pytest.raises(DataError, match=word): read(name, **kw)
    name, w, h, *rest = row('7', wide, 'bottom-up')
    write(tmp_path/'turned.tsv', [[name, h, w, *rest]])
    with pytest.raises(DataError, match=r"turned.tsv, row 1: box 1 .* outside its image of 300 x 640 .*order='hw'"): read('turned')
    assert_close(region_inputs(read('turned', order='hw')), six)
    with pytest.raises(ValueError, match="order must be 'wh' or 'hw'"): RegionReader(tmp_path, order='h')
    skipping = RegionReader(tmp_path/'other.tsv', on_error='skip')
    assert list(skipping) == [] and len(skipping.problems) == 1


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path/'empty.tsv').write_bytes(b''); (tmp_path/'heading.tsv').write_bytes(b'image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures\n'); (tmp_path/'folder').mkdir()
    for name in ('empty.tsv', 'heading.tsv', 'folder'):
        with pytest.raises(DataError, match=f'{name} holds no regions'): list(RegionReader(tmp_path/name))
    with pytest.raises(ValueError, match=r'features \(3, 2\) holds NaN or infinity, first of region 1'): Regions(torch.tensor([[0., 1.], [math.nan, 0.], [1., 1.]]), torch.zeros(3, 4))
    store = write_store(tmp_path/'store', [('a', some_regions(3))])
    for call in (lambda: store.at([0], -1), lambda: store.batch(['a'], max_regions=-1)):
        with pytest.raises(ValueError, match='max_regions must be at least 1, got -1'): call()


def test_photos_become_regions_in_their_order():
    "Every image once, under its id, as the grid says it; whatever the batch."
    pictures = (255*torch.rand(5, 40, 56, 3, generator=make_generator(0))).byte().numpy()
    pairs = Pairs.from_arrays(pictures, [f'caption {i}' for i in range(5)], np.arange(5), image_ids=[f'photo {i}' for i in range(5)])
    grid, seen = GridRegions(vision_tower(VisionConfig(image_size=32, patch_size=16, width=16, layers=1, heads=2, stem_channels=0))).eval(), ImageTransform(32, squash=True)
    one, two = (list(photo_regions(pairs, grid, seen, batch_size=n)) for n in (5, 2))
    assert [name for name, _ in one] == [name for name, _ in two] == pairs.image_ids
    for i, ((_, a), (_, b)) in enumerate(zip(one, two)):
        assert_close(region_inputs(a), region_inputs(b)); assert len(a) == 4 and (a.width, a.height) == (32, 32) and a.tags is None
        with torch.no_grad(): assert_close(region_inputs(a), grid(seen(pairs.load_image(i))[None])[0])
        assert geometry_order(region_inputs(a)[:,-6:]) == 'either' and a.boxes.amax() == 32
