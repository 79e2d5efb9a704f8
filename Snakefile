# From recordings and stimuli to a report:
#
#   fetch -> responses -> features -> encode -> evaluate -> report
#
# `brainalign run CONFIG` starts it; so does `snakemake --configfile CONFIG --cores N`, or `--profile workflows/profiles/slurm`.
# A rule is one command of brainalign. Options of a command come from the configuration through `params`, so a changed setting
# reruns what depends on it and nothing else.

from snakemake.utils import min_version

from brainalign.config import joint_models, validate_config

min_version("9.3")

if not config:

    configfile: "configs/demo.yaml"


config = validate_config(config)
OUT = config["output"]


include: "workflows/common.smk"
include: "workflows/fetch.smk"
include: "workflows/responses.smk"
include: "workflows/features.smk"
include: "workflows/encoding.smk"
include: "workflows/evaluation.smk"
include: "workflows/attention.smk"
include: "workflows/synthesis.smk"
include: "workflows/captioning.smk"
include: "workflows/auditory.smk"
include: "workflows/psychophysics.smk"
include: "workflows/report.smk"
include: "workflows/small_models.smk"


rule all:
    default_target: True
    input:
        f"{OUT}/report/index.html",
