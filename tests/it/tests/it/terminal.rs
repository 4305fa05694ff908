//! The command line, as somebody at a terminal of their own plays it.

use std::path::PathBuf;
use std::process::Stdio;

use latchkey_harness::{LIMIT, Stage};
use serde_json::Value;
use tokio::io::AsyncWriteExt;

/// Somebody at a terminal of their own: their credentials file, and what they type.
pub(crate) struct Terminal<'a> {
    stage: &'a Stage,
    config: PathBuf,
}

impl<'a> Terminal<'a> {
    pub(crate) fn of(stage: &'a Stage, who: &str) -> Self {
        Self { stage, config: stage.directory().join(format!("{who}.json")) }
    }

    /// That of the stage's owner, signed in.
    pub(crate) async fn of_owner(stage: &'a Stage) -> Self {
        let ada = Self::of(stage, Stage::OWNER);
        ada.done(&ada.login(""), &format!("{}\n", stage.owner.token())).await;
        ada
    }

    /// Runs `latchkey` and returns its exit code and both its outputs.
    pub(crate) async fn run(&self, arguments: &str, typed: &str) -> (i32, String, String) {
        let mut command = self.stage.programs().cli().command();
        command.arg("--config").arg(&self.config).args(arguments.split(' '));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(typed.as_bytes()).await.unwrap();
        let ended = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
        let ended = ended.expect("it does not end").unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (ended.status.code().unwrap_or(-1), text(&ended.stdout), text(&ended.stderr))
    }

    /// Runs what must go well and returns what it wrote.
    pub(crate) async fn done(&self, arguments: &str, typed: &str) -> String {
        let (code, out, err) = self.run(arguments, typed).await;
        assert_eq!(code, 0, "{arguments}: {err}");
        out
    }

    pub(crate) async fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.done(&format!("{arguments} -o json"), "").await).unwrap()
    }

    pub(crate) fn login(&self, more: &str) -> String {
        let (url, ca) = (self.stage.plane.people_url(), self.stage.plane.ca_file().display());
        format!("login {url} --ca-file {ca}{more}")
    }
}
