"Packaging: everything that varies is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {key.removesuffix('_requirements'): cfg[key].split() for key in cfg if key.endswith('_requirements')}

setup(version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(), author=cfg['author'],
      url=cfg['git_url'], long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=find_packages(include=['vlwb', 'vlwb.*']), install_requires=cfg['requirements'].split(), extras_require=extras,
      entry_points={'console_scripts': cfg['console_scripts'].split()}, zip_safe=False)
