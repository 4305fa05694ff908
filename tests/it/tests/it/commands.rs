//! What stands or falls with the commands themselves: a weaker policy and its code, an export and
//! its proof, and the word to who comes second.

use std::path::{Path, PathBuf};

use latchkey_harness::{Stage, StageOptions, reason};
use latchkey_proto::v1::{self, MfaPolicy};
use serde_json::Value;

use crate::support::{options, small};
use crate::terminal::Terminal;

/// A stage without runners, and its owner at a terminal.
async fn stage() -> Stage {
    Stage::start(StageOptions { runners: vec![], ..options() }).await.unwrap()
}

async fn signed_in<'a>(stage: &'a Stage, who: &str, token: &str) -> Terminal<'a> {
    let terminal = Terminal::of(stage, who);
    terminal.done(&terminal.login(""), &format!("{token}\n")).await;
    terminal
}

#[tokio::test]
async fn a_weaker_policy_asks_for_a_code_and_only_a_right_one_lets_it_through() {
    let stage = stage().await;
    let ada = signed_in(&stage, "ada", stage.owner.token()).await;
    stage.owner.create_environment("web", MfaPolicy::PlansAndApplies).await.unwrap();
    let settings = async || stage.owner.environment("web").await.unwrap().settings.unwrap();
    let level = async || settings().await.mfa_policy();
    let before = settings().await;
    let weaken = "env set web --mfa-policy applies-only";

    // Nobody is there to be asked.
    let (code, _, err) = ada.run(weaken, "").await;
    assert_ne!(code, 0);
    assert!(err.contains("code"), "{err}");
    assert_eq!(settings().await, before);

    let wrong = stage.aws.wrong_code().await.unwrap();
    let (code, _, err) = ada.run(weaken, &format!("{wrong}\n")).await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("CODE_REJECTED"), "{err}");
    assert_eq!(settings().await, before);

    let right = stage.aws.unused_code().await.unwrap();
    let shown = ada.done(weaken, &format!("{right}\n")).await;
    assert!(shown.contains("applies only"), "{shown}");
    assert_eq!(level().await, MfaPolicy::AppliesOnly);
    // The same code is good for nothing more, and was sent once.
    let (code, _, err) = ada.run("env set web --mfa-policy never", &format!("{right}\n")).await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("CODE_USED"), "{err}");
    assert_eq!(level().await, MfaPolicy::AppliesOnly);
    assert_eq!(stage.aws.requests_with_code(&right).await.unwrap(), 1);
    // Stricter takes none.
    ada.done("env set web --mfa-policy plans-and-applies", "").await;
    assert_eq!(level().await, MfaPolicy::PlansAndApplies);
}

/// Keeps an export in a file of its own.
fn keep(stage: &Stage, name: &str, lines: &[String]) -> PathBuf {
    let path = stage.directory().join(name);
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn an_export_is_verified_without_a_control_plane_and_a_forged_one_refused() {
    let stage = stage().await;
    let ada = signed_in(&stage, "ada", stage.owner.token()).await;
    stage.owner.create_environment("web", MfaPolicy::Never).await.unwrap();
    let run = stage.owner.queue("web", &small()).await.unwrap();
    stage.owner.cancel(&run.run_id).await.unwrap();
    let (code, exported, told) = ada.run("audit export", "").await;
    assert_eq!(code, 0, "{told}");
    let lines: Vec<String> = exported.lines().map(str::to_owned).collect();
    let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    let head = last["digest"].as_str().unwrap().to_owned();
    assert!(told.contains(&head), "{told}");
    let actions: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["action"].clone())
        .collect();
    for action in ["bootstrap", "create_environment", "queue_run", "cancel_run"] {
        assert!(actions.contains(&action.into()), "{action}: {actions:?}");
    }
    // What the control plane itself says of its chain is the same.
    let verified = ada.json("audit verify").await;
    assert_eq!(verified["records"], lines.len());
    assert_eq!(verified["head_digest"], head.as_str());

    // From a terminal that knows no control plane.
    let nobody = Terminal::of(&stage, "nobody");
    let verify = async |path: &Path, more: &str| {
        let (code, out, err) =
            nobody.run(&format!("audit verify --file {}{more} -o json", path.display()), "").await;
        let told = serde_json::from_str::<Value>(&out).unwrap_or(Value::Null);
        (code, told, err)
    };
    let whole = keep(&stage, "whole.jsonl", &lines);
    let noted = format!(" --head {head}");
    for more in ["", &noted] {
        let (code, told, err) = verify(&whole, more).await;
        assert_eq!(code, 0, "{err}");
        assert_eq!((&told["intact"], &told["records"]), (&true.into(), &lines.len().into()));
        assert_eq!(told["head_digest"], head.as_str());
    }
    // Another name in one record.
    let mut forged = lines.clone();
    let at = forged.iter().position(|line| line.contains("\"create_environment\"")).unwrap();
    forged[at] = forged[at].replace("user ada", "user eve");
    assert_ne!(forged[at], lines[at]);
    let (code, told, _) = verify(&keep(&stage, "forged.jsonl", &forged), "").await;
    assert_eq!((code, &told["intact"]), (1, &false.into()));
    assert_eq!(told["broken_at"], at as u64 + 1);
    // One left out in the middle.
    assert!(at + 1 < lines.len());
    let mut without = lines.clone();
    without.remove(at);
    let (code, told, _) = verify(&keep(&stage, "without.jsonl", &without), "").await;
    assert_eq!((code, &told["intact"]), (1, &false.into()));
    // Cut off at the end: what was noted elsewhere tells.
    let (code, told, _) =
        verify(&keep(&stage, "cut.jsonl", &lines[..lines.len() - 1]), &noted).await;
    assert_eq!((code, &told["intact"]), (1, &false.into()));
    // Cut off within a line.
    let mut torn = lines.clone();
    let short = torn.last().unwrap().len() / 2;
    torn.last_mut().unwrap().truncate(short);
    let (code, _, err) = verify(&keep(&stage, "torn.jsonl", &torn), "").await;
    assert_ne!(code, 0, "{err}");
}

#[tokio::test]
async fn who_comes_second_is_told_at_the_terminal_who_did_what() {
    let stage = stage().await;
    let ada = signed_in(&stage, "ada", stage.owner.token()).await;
    stage.owner.create_environment("web", MfaPolicy::Never).await.unwrap();
    let bob = ada.done("user create bob --role member --access write", "").await;
    let bob = signed_in(&stage, "bob", bob.trim()).await;
    let run = stage.owner.queue("web", &small()).await.unwrap();
    let id = &run.run_id;
    bob.done(&format!("cancel {id}"), "").await;
    let (code, _, err) = ada.run(&format!("discard {id}"), "").await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("bob canceled the run at "), "{err}");
    assert!(err.contains("; the run is Canceled"), "{err}");
    let request = v1::DiscardRequest { run_id: id.clone() };
    let status = stage.owner.runs().discard(request).await.unwrap_err();
    assert_eq!(reason(&status), "WRONG_STATE");
    assert!(status.message().starts_with("bob canceled the run at "), "{status}");
}
