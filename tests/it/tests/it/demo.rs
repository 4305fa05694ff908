//! What a newcomer sees first.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;

use crate::support::programs;

const LIMIT: Duration = Duration::from_secs(120);

#[tokio::test]
async fn the_demo_plays_the_main_story_and_ends_well() -> anyhow::Result<()> {
    let mut command = programs().dev("demo").command();
    let ended = tokio::time::timeout(LIMIT, command.stdin(Stdio::null()).output());
    let output = ended.await.context("the demo hangs")??;
    let (told, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{told}\n{complained}", output.status);
    for line in [
        "reason: CODE_REJECTED",
        "[x] failed: the last code was refused; the run still waits",
        "Plan: 20 to add, 0 to change, 0 to destroy",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI is set",
        "AWS_SECRET_ACCESS_KEY is not set",
        "https://web.example.com/?release=2026.11",
        "Authenticated with MFA by ada (plan",
        "Authenticated with MFA by ada (apply",
        "[ok] AWS saw each of the three codes exactly once",
        "That was the main story",
    ] {
        assert!(told.contains(line), "{line:?} is missing:\n{told}");
    }
    assert!(!told.contains('\u{1b}'), "colours are for terminals");
    Ok(())
}

#[tokio::test]
async fn without_terraform_and_a_mirror_the_demo_says_where_to_get_one() -> anyhow::Result<()> {
    let mut command = programs().dev("demo").command();
    let empty = tempfile::tempdir()?;
    command.env("PATH", "/nonexistent").env("XDG_CACHE_HOME", empty.path());
    command.env("LATCHKEY_ENGINE_MIRROR", empty.path());
    let output = command.stdin(Stdio::null()).output().await?;
    assert!(!output.status.success());
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(complained.contains("https://opentofu.org/docs/intro/install/"), "{complained}");
    Ok(())
}
