//! The command line, as somebody at a terminal of their own plays it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use latchkey_harness::{LIMIT, Person, Stage};
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

/// The command line of somebody who has a token already, and types nothing.
pub(crate) struct Cli<'a> {
    stage: &'a Stage,
    config: PathBuf,
}

impl<'a> Cli<'a> {
    pub(crate) fn of(stage: &'a Stage, person: &Person) -> anyhow::Result<Self> {
        let config = stage.directory().join(format!("cli-{}.json", person.name));
        let content = serde_json::json!({
            "address": stage.plane.people_url(),
            "ca_pem": stage.plane.ca_pem()?,
            "token": person.token(),
            "organization": person.organization,
        });
        fs::write(&config, content.to_string())?;
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
        Ok(Self { stage, config })
    }

    /// Somebody who is not signed in.
    pub(crate) fn stranger(stage: &'a Stage) -> Self {
        Self { stage, config: stage.directory().join("nobody.json") }
    }

    pub(crate) async fn run(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = self.stage.programs().cli().command();
        Ok(command.arg("--config").arg(&self.config).args(arguments).output().await?)
    }

    /// Returns what a command that must end well printed.
    pub(crate) async fn text(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.run(arguments).await?;
        anyhow::ensure!(output.status.success(), "{arguments:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(crate) async fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.text(&[arguments, &["-o", "json"]].concat()).await?;
        Ok(serde_json::from_str(&text)?)
    }
}
