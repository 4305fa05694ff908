//! The pages name the tests that prove what they say; they must not outlive them. What the README
//! shows of the command line is played.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{env, fs};

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::support::programs;

const LIMIT: Duration = Duration::from_secs(120);

/// The pages that people read, wherever they lie.
fn pages(root: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(root.join("deploy")).unwrap().flatten().map(|entry| entry.path());
    let of_deploy = listed.filter(|path| path.extension().is_some_and(|found| found == "md"));
    let others = ["README.md", "INVARIANTS.md", "deploy/systemd/README.md"];
    of_deploy.chain(others.map(|name| root.join(name))).collect()
}

#[test]
fn every_test_and_file_that_a_page_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut named = 0;
    for page in pages(&root) {
        let text = fs::read_to_string(&page).unwrap();
        for piece in text.split('[').skip(1) {
            let Some((name, rest)) = piece.split_once("](") else { continue };
            let Some((path, _)) = rest.split_once(')') else { continue };
            let found = fs::read_to_string(page.with_file_name(path));
            let found = found.unwrap_or_else(|error| panic!("{}: {path}: {error}", page.display()));
            if path.ends_with(".rs") {
                let name = name.trim_matches('`');
                assert!(found.contains(&format!("fn {name}(")), "{name} is not in {path}");
                named += 1;
            }
        }
    }
    assert!(named > 20, "only {named} tests are named");
}

/// The code blocks behind `<!-- tour -->`.
fn tour(readme: &str) -> String {
    let blocks = readme.split("<!-- tour -->\n```sh\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap()).collect()
}

/// What somebody has after following what `cargo dev` says: two commands, signed in.
fn with_commands(directory: &Path, config: &str, aws: &str) {
    let exe = env!("CARGO_BIN_EXE_latchkey-it");
    for (name, line) in [
        ("latchkey", format!("LATCHKEY_CONFIG='{config}' exec '{exe}' cli \"$@\"")),
        ("code", format!("exec '{exe}' code {aws}")),
    ] {
        let path = directory.join(name);
        fs::write(&path, format!("#!/bin/sh\n{line}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[tokio::test]
async fn the_tour_of_the_readme_is_true() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let script = tour(&fs::read_to_string(root.join("README.md"))?);
    assert!(script.lines().count() > 10, "{script}");
    let mut dev = programs().dev("dev").command().stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(dev.stdout.take().context("it is piped")?).lines();
    let (mut config, mut aws) = (String::new(), String::new());
    let told = async {
        while let Some(line) = lines.next_line().await? {
            let line = line.trim();
            if let Some(path) = line.strip_prefix("export LATCHKEY_CONFIG=") {
                config = path.to_owned();
            }
            if let Some((_, address)) = line.split_once("simulated AWS   http://") {
                aws = address.to_owned();
            }
            if line.starts_with("Logs are in") {
                return Ok(());
            }
        }
        anyhow::bail!("`dev` ended before it said how to use it")
    };
    tokio::time::timeout(LIMIT, told).await.context("`dev` says nothing")??;

    let commands = tempfile::tempdir()?;
    with_commands(commands.path(), &config, &aws);
    let path = format!("{}:{}", commands.path().display(), env::var("PATH")?);
    let mut shell = Command::new("sh");
    shell.args(["-euxc", &script]).env("PATH", path).current_dir(&root).kill_on_drop(true);
    let ended = tokio::time::timeout(LIMIT, shell.stdin(Stdio::null()).output());
    let output = ended.await.context("the tour hangs")??;
    let (told, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{told}\n{complained}", output.status);
    for line in [
        "Authenticated with MFA by ada (plan",
        "Authenticated with MFA by ada (apply",
        "https://web.example.com/?release=2026.12",
        "Applied",
        "Canceled",
    ] {
        assert!(told.contains(line), "{line:?} is missing:\n{told}\n{complained}");
    }

    // As Ctrl-C does, so that it removes what it made.
    let id = dev.id().context("it runs")?.to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().await?.success());
    let stopped = tokio::time::timeout(LIMIT, dev.wait()).await.context("`dev` stays")??;
    assert!(stopped.success(), "{stopped}");
    Ok(())
}
