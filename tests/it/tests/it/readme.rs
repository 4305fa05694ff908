//! The README names the tests that prove what it says; it must not outlive them. What it shows
//! of the command line is played.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use std::{env, fs};

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::support::programs;

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn every_test_that_the_readme_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let mut named = 0;
    for piece in readme.split("[`").skip(1) {
        let Some((name, rest)) = piece.split_once("`](") else { continue };
        let Some((path, _)) = rest.split_once(')') else { continue };
        let text = fs::read_to_string(root.join(path));
        let text = text.unwrap_or_else(|error| panic!("{path}: {error}"));
        if path.ends_with(".rs") {
            assert!(text.contains(&format!("fn {name}(")), "{name} is not in {path}");
            named += 1;
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
