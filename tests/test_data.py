"What the data notebooks do not show: every bad input through every reader, round trips, orders, streams in several processes."
import csv, io, json, os, subprocess, sys, tarfile, tempfile
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlwb.core import DataError, make_generator
from vlwb.data.features import FeatureSet, read_features, save_features, shuffle_buffer, stream_batches, stream_pairs
from vlwb.data.inputs import ImageTransform, PairDataset, WordTokenizer, as_is, epoch_order, make_loader
from vlwb.data.pairs import Fields, Pairs, check_images, open_image, read_pairs
from vlwb.data.relevance import Relevance, from_pairs, own_captions, read_cxc, read_eccv, read_matches, union

GOOD = [('a.png', 'a dog'), ('a.png', 'a brown dog'), ('b.png', 'a cat')]

@pytest.fixture
def photos(tmp_path):
    for name in 'abc': Image.new('RGB', (8,6), 'red').save(tmp_path/f'{name}.png')
    noise = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)).save(noise, 'jpeg')
    (tmp_path/'half.jpg').write_bytes(noise.getvalue()[:2000])
    return tmp_path

def karpathy(rows):
    images = {}
    for k, (file, caption) in enumerate(rows):
        row = images.setdefault(file, dict(filename=file, split='train', sentences=[], imgid=len(images)))
        row['sentences'].append(dict(raw=caption, sentid=k))
    return json.dumps(dict(images=list(images.values()), dataset='flickr8k'))

def coco(rows):
    files = list(dict.fromkeys(f for f, _ in rows))
    return json.dumps(dict(images=[dict(id=k, file_name=f) for k, f in enumerate(files)], annotations=[dict(id=k, image_id=files.index(f), caption=c) for k, (f, c) in enumerate(rows)]))

def table(rows):
    out = io.StringIO(); csv.writer(out).writerows([('image', 'caption'), *rows]); return out.getvalue()

FORMS = {'dataset_flickr8k.json': karpathy, 'captions_val2017.json': coco, 'pairs.csv': table,
    'pairs.jsonl': lambda rows: ''.join(json.dumps(dict(image=f, caption=c)) + '\n' for f, c in rows),
    'albef.json': lambda rows: json.dumps([dict(image=f, caption=c) for f, c in rows]),
    'pairs.tsv': lambda rows: 'image\tcaption\n' + ''.join(f'{f}\t{c}\n' for f, c in rows),
    'results.token': lambda rows: ''.join(f'{f}#{[r[0] for r in rows[:k]].count(f)}\t{c}\n' for k, (f, c) in enumerate(rows))}

@pytest.mark.parametrize('name', FORMS)
def test_every_form_reads_the_same_set(photos, name):
    (photos/name).write_text(FORMS[name](GOOD))
    pairs = read_pairs(photos/name)
    assert pairs.captions == [c for _, c in GOOD] and pairs.caption_image.tolist() == [0,0,1] and pairs.load_image(1).size == (8,6)
    assert [p.name for p in pairs.images] == ['a.png', 'b.png'] and len(pairs.problems) == 0 and pairs.captions_of(0) == ['a dog', 'a brown dog']
    assert read_pairs(photos/name, images=False).images is None

BAD = {'missing': (('z.png', 'of nothing'), 'missing'), 'empty caption': (('c.png', '   '), 'empty'), 'outside': (('../b.png', 'x'), 'outside'), 'absolute': (('/etc/passwd', 'x'), 'outside'),
    'truncated': (('half.jpg', 'half a photo'), 'decoded')}

@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('fault', BAD)
def test_bad_row_is_named_or_skipped_alone(photos, name, fault):
    row, word = BAD[fault]
    (photos/name).write_text(FORMS[name]([*GOOD[:2], row, GOOD[2]]))
    with pytest.raises(DataError, match=word) as error: read_pairs(photos/name, check='decode')
    assert name in str(error.value) and any(place in str(error.value) for place in ('line ', 'images[', 'annotations[', 'item ')), error.value
    kept = read_pairs(photos/name, check='decode', on_error='skip')
    assert kept.captions == [c for _, c in GOOD] and kept.num_images == 2
    assert 1 <= len(kept.problems) <= 2 and word in str(kept.problems)

@pytest.mark.parametrize('name', FORMS)
def test_files_that_are_empty_or_not_utf8(photos, name):
    (photos/name).write_bytes(b'')
    with pytest.raises(DataError, match='empty'): read_pairs(photos/name)
    (photos/name).write_bytes(FORMS[name]([*GOOD, ('c.png', 'kaffee')]).encode().replace(b'kaffee', 'caf\u00e9'.encode('latin-1')))
    with pytest.raises(DataError, match='not UTF-8'): read_pairs(photos/name)
    if name.endswith('.json'): return
    kept = read_pairs(photos/name, on_error='skip')
    assert kept.captions == [c for _, c in GOOD] and len(kept.problems) == 1

@pytest.mark.parametrize('name', ['pairs.jsonl', 'dataset_flickr8k.json', 'captions_val2017.json'])
def test_malformed_json_names_the_line(photos, name):
    (photos/name).write_text(FORMS[name](GOOD)[:-3] + '\n{"x"')
    with pytest.raises(DataError, match='line [0-9]'): read_pairs(photos/name)

def test_wrong_column_and_duplicate_keys(photos):
    (photos/'x.csv').write_text('bild,wort\na.png,a dog\n')
    with pytest.raises(DataError, match="no caption column among \\['bild', 'wort'\\]"): read_pairs(photos/'x.csv')
    assert read_pairs(photos/'x.csv', fields=Fields(image=('bild',), caption=('wort',))).captions == ['a dog']
    (photos/'x.csv').write_text('image,caption,Caption\na.png,a,b\n')
    with pytest.raises(DataError, match='twice'): read_pairs(photos/'x.csv')
    for text in ('{"image": "a.png", "caption": "x", "caption": "y"}', '{"image": "a.png", "caption": "x", "caption_id": 1}\n{"image": "b.png", "caption": "y", "caption_id": 1}',
                 '{"image": "a.png", "image_id": 1, "caption": "x"}\n{"image": "b.png", "image_id": 1, "caption": "y"}', '{"image": "a.png", "image_id": 1, "caption": "x"}\n{"image": "a.png", "image_id": 2, "caption": "y"}'):
        (photos/'x.jsonl').write_text(text)
        with pytest.raises(DataError, match='line [12]'): read_pairs(photos/'x.jsonl')
    (photos/'x.json').write_text(json.dumps(dict(images=[dict(id=1, file_name='a.png')], annotations=[dict(id=1, image_id=5, caption='x'), dict(id=2, image_id=1, caption='y')])))
    with pytest.raises(DataError, match=r'annotations\[0\].*image id 5'): read_pairs(photos/'x.json')
    assert read_pairs(photos/'x.json', on_error='skip').captions == ['y']

def test_a_link_that_leaves_the_folder(photos):
    inner = photos/'inner'; inner.mkdir(); (inner/'link.png').symlink_to(photos/'a.png'); (inner/'x.jsonl').write_text('{"image": "link.png", "caption": "x"}')
    with pytest.raises(DataError, match='outside'): read_pairs(inner/'x.jsonl')

def test_rows_of_other_splits_are_not_judged(photos):
    (photos/'x.jsonl').write_text('{"image": "a.png", "caption": "x", "split": "test"}\n{"image": "gone.png", "split": "train"}\n')
    assert read_pairs(photos/'x.jsonl', split='test').captions == ['x']
    with pytest.raises(DataError, match="no split \\['val'\\]"): read_pairs(photos/'x.jsonl', split='val')

def test_every_mode_becomes_rgb(tmp_path):
    for mode in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I', 'I;16', 'F'):
        file = tmp_path/f'{mode.replace(";", "")}.tif'
        try: Image.new(mode, (4,3)).save(file)
        except OSError: continue                          # this mode has no file form
        assert open_image(file).mode == 'RGB' and open_image(file).size == (4,3)

def test_skip_report_survives_select_and_check(photos):
    (photos/'x.jsonl').write_text('{"image": "half.jpg", "caption": "h"}\n{"image": "z.png", "caption": "z"}\n{"image": "a.png", "caption": "a"}\n')
    kept = check_images(read_pairs(photos/'x.jsonl', on_error='skip'), on_error='skip')
    assert kept.captions == ['a'] and len(kept.problems) == 2
    with pytest.raises(DataError, match='half.jpg'): PairDataset(read_pairs(photos/'x.jsonl', on_error='skip'), WordTokenizer.learn(['h']), ImageTransform(4)).batch([0])

text = st.text(st.characters(exclude_categories=('Cs', 'Cc', 'Zl', 'Zp')), min_size=1, max_size=20).filter(lambda s: s.strip() and s.strip() == ' '.join(s.split()))
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), text), min_size=1, max_size=6))
def test_round_trip_of_any_text(rows):
    with tempfile.TemporaryDirectory() as folder:
        for name in ('x.jsonl', 'x.csv', 'x.json'):
            path = Path(folder)/name; path.write_text(dict(jsonl=FORMS['pairs.jsonl'], csv=table, json=karpathy)[name[2:]]([(f'{f}.png', c) for f, c in rows]), encoding='utf-8', newline='')
            pairs = read_pairs(path, images=None, check='none')
            assert sorted(pairs.captions) == sorted(c.strip() for _, c in rows) and sorted(pairs.image_ids) == sorted({f'{f}.png' for f, _ in rows})

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=40), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_order_visits_every_caption_once(images, size, seed, one):
    batches = epoch_order(images, size, seed, epoch=seed, one_caption_per_image=one)
    assert sorted(int(i) for b in batches for i in b) == list(range(len(images))) and all(0 < len(b) <= size for b in batches)
    if one: assert all(len({images[i] for i in b}) == len(b) for b in batches)
    again = epoch_order(images, size, seed, epoch=seed, one_caption_per_image=one)
    assert all((a == b).all() for a, b in zip(batches, again))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(0, 20), st.integers(0, 3))
def test_buffer_loses_nothing(n, size, seed):
    out = list(shuffle_buffer(range(n), size, make_generator(seed)))
    assert sorted(out) == list(range(n)) and all(out.index(i) >= i - max(size, 1) + 1 for i in out)

def memory(n=12, size=8):
    rng = np.random.default_rng(0)
    return Pairs.from_arrays(rng.integers(0, 255, (n,size,size,3), dtype=np.uint8), [f'word{i} number {k}' for i in range(n) for k in range(2)], np.repeat(np.arange(n), 2))

def test_loader_is_the_same_in_other_processes():
    data = PairDataset(memory(), WordTokenizer.learn(memory().captions), ImageTransform(8, train=True, flip=True))
    here, there = (list(make_loader(data, 5, seed=2, epoch=1, workers=w)) for w in (0, 2))
    assert len(here) == len(there) == 5
    for a, b in zip(here, there): torch.testing.assert_close((a.images, a.texts, a.image_ids, a.index), (b.images, b.texts, b.image_ids, b.index), rtol=0, atol=0)

def test_features_serve_as_pairs_do():
    pairs = memory(); features = FeatureSet(torch.randn(12,3), torch.randn(24,3), pairs.caption_image)
    for a, b in zip(make_loader(features, 5, seed=1, one_caption_per_image=True), make_loader(PairDataset(pairs, WordTokenizer.learn(pairs.captions)), 5, seed=1, one_caption_per_image=True)):
        torch.testing.assert_close((a.image_ids, a.index), (b.image_ids, b.index))

@pytest.mark.parametrize('ending', ['npz', 'safetensors', 'arrow', 'parquet'])
def test_features_keep_odd_ids_and_half_precision(tmp_path, ending):
    features = FeatureSet(torch.randn(2,3).half(), torch.randn(3,5).half(), [1,0,1], ['\u00e9', 'b"c'], ['x', 'y,z', '1'], ['caf\u00e9', 'tab\tin', ''])
    same = read_features(save_features(tmp_path/f'f.{ending}', features))
    at = [same.image_ids.index(i) for i in features.image_ids]                            # Arrow numbers images as they first occur
    torch.testing.assert_close(same.image_features[at], features.image_features); torch.testing.assert_close(same.text_features, features.text_features)
    assert same.caption_ids == features.caption_ids and same.captions == features.captions
    assert [same.image_ids[i] for i in same.caption_image] == [features.image_ids[i] for i in features.caption_image]

def shards(folder, count=4, each=5):
    image = io.BytesIO(); Image.new('RGB', (4,4)).save(image, 'png')
    for s in range(count):
        with tarfile.open(folder/f'{s}.tar', 'w') as tar:
            for k in range(each):
                for name, data in ((f'{k}.png', image.getvalue()), (f'{k}.json', json.dumps(dict(caption=f'{s} {k}', image_id=f'{s}-{k}')).encode())):
                    info = tarfile.TarInfo(name); info.size = len(data); tar.addfile(info, io.BytesIO(data))
    return str(folder/'*.tar')

def test_stream_in_several_processes_gives_every_pair_once(tmp_path):
    pattern = shards(tmp_path)
    alone = sorted(i.caption for i in stream_pairs(pattern, buffer=7, seed=3))
    loader = torch.utils.data.DataLoader(stream_pairs(pattern, buffer=7, seed=3), batch_size=None, num_workers=2, collate_fn=as_is)
    assert sorted(i.caption for i in loader) == alone and len(alone) == 20
    assert sum(len(b) for b in stream_batches(stream_pairs(pattern), WordTokenizer.learn(alone), ImageTransform(4), 6)) == 20

def test_missing_extra_says_how_to_get_it(tmp_path, monkeypatch):
    pattern = shards(tmp_path, 1, 1); monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(ImportError, match=r"pip install 'vlwb\[stream\]'"): stream_pairs(pattern)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ImportError, match=r"pip install 'vlwb\[stream\]'"): stream_pairs(iter([]))

ids = st.lists(st.sampled_from('abcdef'), unique=True, min_size=1, max_size=6)
@settings(max_examples=40, deadline=None)
@given(ids, ids, st.lists(st.tuples(st.sampled_from('abcdef'), st.sampled_from('abcdef'), st.booleans(), st.integers(0, 5)), min_size=1, max_size=12))
def test_align_and_union_keep_every_pair(rows, columns, listed):
    i, c, yes, grade = zip(*listed)
    r = from_pairs(i, c, yes, grade)
    part = r.align(rows, columns)
    for k, image in enumerate(rows):
        for j, caption in enumerate(columns):
            said = [y for a, b, y, _ in listed if (a, b) == (image, caption)]
            assert part.status(k, j) == (-1 if not said else int(any(said)))
    both = union(r, part).align(r.image_ids, r.caption_ids)
    assert (both.matches != r.matches).nnz == 0 and (both.known != r.known).nnz == 0 and both.grades.nnz == r.grades.nnz

def test_union_keeps_zero_grades_and_first_source():
    a, b = from_pairs(['i'], ['x'], [False], [0.]), from_pairs(['i','i'], ['x','y'], [True,False], [5.,1.])
    both = union(a, b)
    assert both.grades.toarray().tolist() == [[0,1]] and both.grades.nnz == 2 and both.status([0,0], [0,1]).tolist() == [1,0]

def test_published_cxc_csv_and_audit_rows(tmp_path):
    (tmp_path/'sits_val.csv').write_text('caption,image,agg_score,sampling_method\nCOCO_val2014:sentid:648388,COCO_val2014_000000431431.jpg,1.8,c2i_intrasim\nCOCO_val2014:sentid:346617,COCO_val2014_000000302572.jpg,4.99,c2i_intrasim\n')
    cxc = read_cxc([tmp_path/'sits_val.csv'])
    assert cxc.image_ids == ['431431', '302572'] and cxc.matches.toarray().tolist() == [[False,False],[False,True]] and cxc.known.nnz == 2
    pairs = Pairs.from_arrays(None, ['x', 'y'], [0,1], ['431431', '302572'], ['648388', '346617'])
    (tmp_path/'suspects.jsonl').write_text('{"image_id": "431431", "caption_id": "346617", "caption": "y", "score": 0.9, "why": "text"}\n')
    assert read_matches(tmp_path/'suspects.jsonl', pairs).known.nnz == 0
    assert union(own_captions(pairs), read_matches(tmp_path/'suspects.jsonl', pairs, suspects_match=True)).matches.nnz == 3

def test_light_imports():
    code = "import sys, vlwb.data.pairs, vlwb.data.inputs, vlwb.data.features, vlwb.data.relevance; print([m for m in ('transformers','datasets','webdataset','pandas','pyarrow','matplotlib','sklearn','umap') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_a_verdict_log_whose_first_rows_say_no_time(tmp_path):
    "What a script wrote first and a reviewer went on with: the last line about a pair counts, a withdrawn verdict is none."
    rows = [dict(image_id='a', caption_id='1', verdict='match'), dict(image_id='a', caption_id='2', verdict='match', drawn='score'), dict(image_id='a', caption_id='1', verdict='no match', time='2026-01-01T00:00:00Z'),
            dict(image_id='a', caption_id='2', verdict=None, score=.5, drawn='score')]
    path = tmp_path/'verdicts.jsonl'; path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    found = read_matches(path, suspects_match=True)
    assert found.matches.nnz == 0 and found.known.nnz == 1
