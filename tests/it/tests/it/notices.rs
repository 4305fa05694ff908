//! Who is told of runs: a webhook over TLS, also over a kill of the control plane, and people by
//! mail, never in clear. The audit chain that tells of it all is checked from an export, without a
//! control plane.

use std::fs;

use anyhow::Context;
use latchkey_harness::{
    Configuration, Hook, Hooks, LIMIT, Offer, Person, Stage, StageOptions, TestAuthority, reason,
    wait_for,
};
use latchkey_proto::v1::{self, MfaPolicy, RunState};

use crate::gated::Gated;
use crate::support::{options, small};
use crate::terminal::Cli;
use crate::told::{PASSWORD, Told, USER, check_signature};

/// Waits until an attempt that was refused is written down.
async fn refused(ada: &Person, webhook: &str, delivery: &str, status: u32) -> anyhow::Result<()> {
    wait_for("the refused attempt in the log of deliveries", LIMIT, async || {
        let request = v1::ListDeliveriesRequest {
            organization: ada.organization.clone(),
            subscriber_id: webhook.to_owned(),
            page_size: 20,
        };
        let answer = ada.notices().list_deliveries(request).await;
        let listed = answer.map_err(|status| status.to_string())?.into_inner().deliveries;
        let found = listed.iter().find(|found| found.delivery_id == delivery);
        let seen = found.is_some_and(|found| found.last_status == status);
        if seen { Ok(()) } else { Err(format!("{listed:?}")) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_and_a_person_hear_of_runs_over_a_kill_of_the_control_plane() -> anyhow::Result<()>
{
    let told = Told::start().await?;
    let mut options = StageOptions { slots: 2, ..options() };
    options.plane.arguments = told.arguments();
    options.plane.lease_term = Some(2);
    let mut stage = Stage::start(options).await?;
    let ada = stage.owner.clone();
    for (environment, policy) in
        [("vault", MfaPolicy::PlansAndApplies), ("web", MfaPolicy::Never), ("db", MfaPolicy::Never)]
    {
        ada.create_environment(environment, policy).await?;
    }
    let cli = Cli::of(&stage, &ada)?;
    let made = cli.json(&["webhook", "create", &told.hooks.url()]).await?;
    let webhook = made["id"].as_str().context("a webhook has an id")?.to_owned();
    let secret = made["secret"].as_str().context("a webhook has a secret")?.to_owned();
    cli.text(&["mail", "set", "ops@example.com"]).await?;

    // The plan of an apply that will lose its runner begins meanwhile.
    let gated = Gated::new(&stage);
    let lost = ada.queue("db", &gated.configuration()).await?.run_id;

    // Refused at first, it is told again, the same.
    told.hooks.answer(500);
    let vault = ada.queue("vault", &small()).await?.run_id;
    let first = told.hook(&vault, "waiting_for_code", 500).await?;
    told.hooks.answer(200);
    let again = told.hook(&vault, "waiting_for_code", 200).await?;
    assert_eq!(again.body, first.body);
    let delivery = |hook: &Hook| hook.header("x-latchkey-delivery").to_owned();
    assert_eq!(delivery(&again), delivery(&first));
    let body = again.json();
    assert_eq!((&body["organization"], &body["environment"]), (&"acme".into(), &"vault".into()));
    assert_eq!(body["run"]["queued_by"], "ada");
    assert_eq!(body["links"]["run"], format!("https://latchkey.example.com/runs/{vault}"));

    let web = ada.queue("web", &small()).await?.run_id;
    told.hook(&web, "needs_confirmation", 200).await?;

    // The receiver is down when the run is applied, then the control plane, too: it is told all
    // the same.
    ada.wait_for_state(&lost, RunState::AwaitingConfirmation).await?;
    ada.confirm(&lost).await?;
    gated.wait_until_begun().await?;
    told.hooks.answer(503);
    ada.confirm(&web).await?;
    let down = told.hook(&web, "applied", 503).await?;
    // Not in the middle of an attempt, whose claim would have to run out first.
    told.mail_of(&web, "a run was applied").await?;
    refused(&ada, &webhook, &delivery(&down), 503).await?;
    stage.plane.kill().await?;
    told.hooks.answer(204);
    stage.plane.restart().await?;
    let up = told.hook(&web, "applied", 204).await?;
    assert_eq!((delivery(&up), &up.body), (delivery(&down), &down.body));

    // One that ends with an error, and the one whose host dies.
    let broken = Configuration::of(&[("main.tf", "resource \"terraform_data\" \"x\" {")]);
    let broken = ada.queue("web", &broken).await?.run_id;
    let errored = told.hook(&broken, "errored", 204).await?;
    assert!(errored.json()["reason"].as_str().is_some_and(|why| !why.is_empty()));
    stage.runners[0].lose_host().await?;
    let hook = told.hook(&lost, "runner_lost", 204).await?;
    assert!(hook.json()["reason"].as_str().is_some_and(|why| why.contains("went silent")));
    told.hook(&lost, "environment_frozen", 204).await?;

    // Each is signed, over what came.
    for hook in told.hooks.heard() {
        check_signature(&hook, &secret)?;
        assert!(check_signature(&hook, "lkw_another").is_err());
        assert_eq!(hook.json()["delivery"], delivery(&hook));
    }

    // What became of each is shown, with no secret.
    let cli = Cli::of(&stage, &ada)?;
    let listed = cli.json(&["webhook", "deliveries", &webhook]).await?;
    let listed = listed["deliveries"].as_array().context("deliveries are a list")?;
    let applied = listed.iter().find(|found| found["delivery_id"] == delivery(&up));
    let applied = applied.context("the delivery is in the log")?;
    assert_eq!((&applied["state"], &applied["event"]), (&"delivered".into(), &"applied".into()));
    assert!(applied["attempts"].as_u64().is_some_and(|attempts| attempts >= 2), "{applied}");
    let text = cli.text(&["webhook", "deliveries", &webhook]).await?;
    for word in ["runner_lost", "delivered", "204", &lost] {
        assert!(text.contains(word), "{text}");
    }
    let log = stage.plane.log();
    assert!(!log.contains(&secret) && !log.contains(PASSWORD) && !log.contains("/hook"));

    // The person was told of the same, over TLS.
    for (run, sentence) in [
        (&vault, "acme/vault: a run waits for a token code"),
        (&web, "acme/web: a plan waits for a confirmation"),
        (&web, "acme/web: a run was applied"),
        (&broken, "acme/web: a run ended with an error"),
        (&lost, "acme/db: a runner was lost during an apply"),
    ] {
        let mail = told.mail_of(run, sentence).await?;
        assert_eq!(mail.to, ["<ops@example.com>"]);
        assert!(mail.encrypted);
    }

    // The chain, taken away and checked by somebody who is not even signed in.
    let export = cli.text(&["audit", "export"]).await?;
    let head = export.lines().last().and_then(|line| line.rsplit('"').nth(1));
    let head = head.context("an export has a last record")?.to_owned();
    assert!(export.contains("\"action\":\"create_webhook\"") && !export.contains(&secret));
    let file = stage.directory().join("audit.jsonl");
    let path = file.display().to_string();
    let verify = ["audit", "verify", "--file", &path, "--head", &head];
    fs::write(&file, &export)?;
    let stranger = Cli::stranger(&stage);
    stranger.text(&verify).await?;
    let edited =
        export.replacen("\"action\":\"create_webhook\"", "\"action\":\"delete_webhook\"", 1);
    let line = export.lines().position(|line| line.contains("create_webhook"));
    let line = line.context("the webhook was audited")? + 1;
    fs::write(&file, edited)?;
    let output = stranger.run(&verify).await?;
    let said = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&format!("BROKEN at record {line}")), "{said}");
    Ok(())
}

/// What may be said before there is TLS.
fn is_harmless(line: &str) -> bool {
    line.starts_with("EHLO ") || line == "STARTTLS" || line == "QUIT"
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_go_out_over_tls_to_whom_they_are_for_or_not_at_all() -> anyhow::Result<()> {
    let told = Told::start().await?;
    let mut options = StageOptions { runners: vec![], ..options() };
    options.plane.arguments = told.arguments();
    let stage = Stage::start(options).await?;
    let ada = &stage.owner;
    let cli = Cli::of(&stage, ada)?;
    cli.text(&["mail", "set", "ops@example.com"]).await?;
    let test = ["mail", "test", "ops@example.com", "-o", "json"];

    // Who takes mail in clear only, whom nobody certified, and who mixes clear with TLS, get none.
    let stranger = TestAuthority::new()?;
    for (offer, complaint) in [
        (Offer::Nothing, "does not offer STARTTLS"),
        (Offer::StartTls(stranger.server()?), "invalid peer certificate"),
        (Offer::Injecting(told.authority.server()?), "before TLS"),
    ] {
        told.mail.set(offer);
        let output = cli.run(&test).await?;
        assert!(!output.status.success(), "{complaint}: {output:?}");
        let delivery: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let detail = delivery["last_detail"].as_str().unwrap_or_default();
        assert!(detail.contains(complaint), "{detail}");
    }
    assert!(told.mail.mails().is_empty(), "{:?}", told.mail.mails());
    let hooks = Hooks::start(stranger.server()?).await?;
    let made = cli.json(&["webhook", "create", &hooks.url()]).await?;
    let output = cli.run(&["webhook", "test", made["id"].as_str().unwrap_or_default()]).await?;
    assert!(String::from_utf8_lossy(&output.stdout).contains("invalid peer certificate"));
    assert!(hooks.heard().is_empty());

    told.mail.set(Offer::StartTls(told.authority.server()?));
    let output = cli.run(&test).await?;
    assert!(output.status.success(), "{output:?}");
    let mail = told.mail.wait_for("the test", |mail| mail.body.contains("a test")).await?;
    assert!(mail.encrypted);
    assert_eq!(mail.signed_in, Some((USER.to_owned(), PASSWORD.to_owned())));
    assert_eq!(
        (mail.from.as_str(), &mail.to[..]),
        ("<latchkey@example.com>", &["<ops@example.com>".to_owned()][..])
    );

    // Names that would be headers are no names; what people write stays in the body.
    let evil = "x\r\nBcc: eve@example.com\r\n\r\n.\r\nRCPT TO:<eve@example.com>";
    let settings = v1::EnvironmentSettings { pool: Stage::POOL.into(), ..Default::default() };
    let refused = ada.create_environment_with(evil, settings).await.unwrap_err();
    assert_eq!(reason(&refused), "FIELD_INVALID");
    assert!(ada.create_user(&stage.plane, evil, v1::Role::Owner).await.is_err());
    assert!(!cli.run(&["mail", "set", evil]).await?.status.success());
    ada.create_environment("web", MfaPolicy::PlansAndApplies).await?;
    let request = v1::QueueRunRequest { message: evil.into(), ..Default::default() };
    let run = ada.queue_with("web", &small(), request).await?.run_id;
    let mail = told.mail.wait_for("the run", |mail| mail.body.contains(&run)).await?;
    assert_eq!(mail.to, ["<ops@example.com>"]);
    let names = mail.head.lines().filter(|line| !line.starts_with([' ', '\t']));
    let names: Vec<&str> = names.filter_map(|line| Some(line.split_once(':')?.0)).collect();
    let usual = [
        "From",
        "To",
        "Subject",
        "Date",
        "Message-ID",
        "Auto-Submitted",
        "MIME-Version",
        "Content-Type",
        "Content-Transfer-Encoding",
    ];
    assert!(names.iter().all(|name| usual.contains(name)), "{}", mail.head);
    assert!(mail.head.contains("Subject: [latchkey] acme/web: a run waits"), "{}", mail.head);
    let breaks_out =
        |line: &str| line.starts_with("Bcc") || line.starts_with("RCPT") || line == ".";
    assert!(!mail.body.lines().any(breaks_out), "{}", mail.body);

    let in_clear = told.mail.in_clear();
    assert!(in_clear.iter().all(|line| is_harmless(line)), "{in_clear:?}");
    Ok(())
}
