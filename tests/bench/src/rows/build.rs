//! A clean build of the programs as they are for use, each alone, and how big it makes them.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::Context as _;
use tokio::process::Command;

use crate::row::{Budget, Context, Figure, Row};

/// Name, package and file.
const PROGRAMS: [(&str, &str, &str); 3] = [
    ("command line", "latchkey-cli", "latchkey"),
    ("runner", "latchkey-runner", "latchkey-runner"),
    ("control plane", "latchkey-control-plane", "latchkey-control-plane"),
];

/// Minutes long: not measured in `--quick`.
pub(crate) async fn measure(context: &Context) -> anyhow::Result<Vec<Row>> {
    if context.quick {
        return Ok(Vec::new());
    }
    let target = tempfile::tempdir()?;
    let begun = Instant::now();
    let mut sizes = Vec::new();
    for (name, package, file) in PROGRAMS {
        build(package, target.path()).await?;
        let path = target.path().join("release").join(file);
        let bytes = std::fs::metadata(path).context("read the size of a program")?.len();
        sizes.push(Row {
            name: format!("build, {name}, size"),
            figure: Figure::mebibytes(bytes as f64),
            limit: None,
            budget: Budget::None,
            note: format!(
                "The release build of {package} alone, without failpoints, not stripped, with \
                 line tables. Grows with the code and what it depends on"
            ),
        });
    }
    let clean = Row {
        name: "build, clean".to_owned(),
        figure: Figure::millis(begun.elapsed()),
        limit: None,
        budget: Budget::None,
        note: "The three programs in release, one after the other into an empty target directory, \
               with the registry's sources at hand. Grows with the code of the tree, most of which \
               is not ours, and shrinks with the cores"
            .to_owned(),
    };
    Ok([vec![clean], sizes].concat())
}

async fn build(package: &str, target: &Path) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--locked", "--quiet", "--package", package])
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .context("start cargo")?;
    anyhow::ensure!(built.success(), "build {package}: {built}");
    Ok(())
}
