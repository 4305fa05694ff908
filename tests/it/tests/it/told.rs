//! Who hears of things in the stories about notices: a webhook and a mail server, certified by an
//! authority that the control plane was given.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::Context;
use aws_lc_rs::hmac;
use latchkey_harness::{Hook, Hooks, Mail, MailServer, Offer, TestAuthority};

/// Whom `--smtp-credentials-file` names.
pub(crate) const USER: &str = "postman";
pub(crate) const PASSWORD: &str = "canary of the postman";

/// Receivers, and the files that tell the control plane of them.
pub(crate) struct Told {
    pub(crate) authority: TestAuthority,
    pub(crate) hooks: Hooks,
    pub(crate) mail: MailServer,
    directory: tempfile::TempDir,
}

impl Told {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let authority = TestAuthority::new()?;
        let hooks = Hooks::start(authority.server()?).await?;
        let mail = MailServer::start(Offer::StartTls(authority.server()?)).await?;
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("ca.pem"), authority.pem())?;
        let credentials = directory.path().join("smtp");
        fs::write(&credentials, format!("{USER}\n{PASSWORD}\n"))?;
        fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600))?;
        Ok(Self { authority, hooks, mail, directory })
    }

    /// What the control plane is started with.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        [
            ["--webhook-network", "127.0.0.0/8"].map(str::to_owned),
            ["--notice-ca".to_owned(), file("ca.pem")],
            ["--notice-retry", "1"].map(str::to_owned),
            ["--public-url", "https://latchkey.example.com"].map(str::to_owned),
            ["--smtp-server".to_owned(), self.mail.address()],
            ["--smtp-from", "latchkey@example.com"].map(str::to_owned),
            ["--smtp-credentials-file".to_owned(), file("smtp")],
        ]
        .concat()
    }

    /// Waits for what the webhook hears of a run and answers with `answered`.
    pub(crate) async fn hook(
        &self,
        run_id: &str,
        event: &str,
        answered: u16,
    ) -> anyhow::Result<Hook> {
        let what = format!("{event} of run {run_id}, answered with {answered}");
        let wanted = |hook: &Hook| {
            hook.header("x-latchkey-event") == event
                && hook.json()["run"]["run_id"] == run_id
                && hook.answered == answered
        };
        self.hooks.wait_for(&what, wanted).await
    }

    /// Waits for the mail that says this of a run.
    pub(crate) async fn mail_of(&self, run_id: &str, sentence: &str) -> anyhow::Result<Mail> {
        let is_it = |mail: &Mail| mail.body.contains(run_id) && mail.body.contains(sentence);
        self.mail.wait_for(sentence, is_it).await
    }
}

/// Checks a signature as a receiver does: over the bytes that came.
pub(crate) fn check_signature(hook: &Hook, secret: &str) -> anyhow::Result<()> {
    let signature = hook.header("x-latchkey-signature");
    let (time, tag) = signature.split_once(",v1=").context("a signature has two parts")?;
    let time = time.strip_prefix("t=").context("the time comes first")?;
    let _: u64 = time.parse()?;
    let signed = [time.as_bytes(), b".", &hook.body].concat();
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let verified = hmac::verify(&key, &signed, &hex::decode(tag)?);
    verified.map_err(|_| anyhow::anyhow!("the signature is wrong: {}", hook.head))
}
