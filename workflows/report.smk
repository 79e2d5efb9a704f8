# The report, from the sections of every study that could be had.


def sections(wildcards):
    return [
        f"{OUT}/sections/{study}-{analysis}"
        for study, s in STUDIES.items()
        if study_available(study)
        for analysis in s["analyses"]
    ] + [
        f"{OUT}/sections/{name}"
        for name, wanted in (
            ("attention", SWEEP), ("synthesis", SYNTHESIS), ("captioning", CAPTIONING),
            ("channels", PSYCHOPHYSICS),
        )
        if wanted
    ]


rule report:
    input:
        sections=sections,
        studies=[f"{OUT}/studies/{s}/fetched.json" for s in STUDIES
                 if STUDIES[s]["loader"] not in UNFETCHED],
        models=[f"{OUT}/models/{m}.json" for m in config["models"]],
        config=workflow.configfiles[0],
    output:
        report(
            OUT + "/report/index.html",
            caption="captions/report.rst",
            category="Report",
        ),
        zipped=OUT + "/report/report.zip",
    log:
        OUT + "/logs/report.log",
    benchmark:
        OUT + "/benchmarks/report.tsv"
    params:
        folder=OUT + "/report",
    threads: resource("report", "threads")
    resources:
        **needs("report"),
    shell:
        "brainalign report {input.sections} --config {input.config} --studies {input.studies}"
        " --models {input.models} --out {params.folder} 2> {log}"
