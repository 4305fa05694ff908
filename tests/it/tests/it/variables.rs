//! What terraform itself gets of variables: values as they were given, whatever is in them, and
//! from where they were meant to come.

use aws_lc_rs::digest::{SHA256, digest};
use latchkey_harness::{Configuration, Person, Stage, StageOptions, reason};
use latchkey_proto::v1::variable_scope::Scope;
use latchkey_proto::v1::{self, MfaPolicy, Phase, RunState, RunVariable, VariableCategory};
use serde_json::Value;
use tonic_types::StatusExt;

use crate::support::{options, stage};

const TERRAFORM: VariableCategory = VariableCategory::Terraform;
const LARGEST: usize = 256 << 10;

fn sha256(text: &str) -> String {
    hex::encode(digest(&SHA256, text.as_bytes()))
}

/// Strings that something on the way could take for something else.
fn odd_strings() -> Vec<(&'static str, String)> {
    let mut strings = vec![
        ("odd-name_1", "plain".to_owned()),
        ("empty", String::new()),
        ("quotes", r#"a "b" 'c' \ \n \" `d`"#.to_owned()),
        ("lines", "\n first\r\n\tsecond \n\n".to_owned()),
        ("templates", "${a} %{if b} $${c} %%{d} $ % $$".to_owned()),
        ("heredoc", "<<EOT\nx\nEOT\n".to_owned()),
        ("unicode", "größe 🦀 \u{2028}\u{fe0f} עברית".to_owned()),
        ("controls", "\u{1}\u{1b}[31m\u{7f}".to_owned()),
        ("hcl-like", "x\"\n}\nother = \"y".to_owned()),
    ];
    strings.push(("large", "0123456789abcdé\"".repeat(LARGEST / 17)));
    strings
}

/// Echoes the digest of each variable, and of the environment variable `ODD` that it applies with.
fn echo(strings: &[(&str, String)]) -> Configuration {
    let mut main = String::new();
    for (name, _) in strings {
        main += &format!("variable \"{name}\" {{\n  type = string\n}}\n");
        main += &format!("output \"{name}\" {{\n  value = sha256(var.{name})\n}}\n");
    }
    main += r#"
variable "object" {
  type = any
}

output "object" {
  value = sha256(jsonencode(var.object))
}

resource "terraform_data" "environment" {
  provisioner "local-exec" {
    command = "echo odd is $(printf %s \"$ODD\" | sha256sum)"
  }
}
"#;
    Configuration::of(&[("main.tf", &main)])
}

fn given(name: &str, value: &str) -> RunVariable {
    RunVariable {
        name: name.into(),
        category: TERRAFORM.into(),
        value: value.into(),
        hcl: false,
        sensitive: false,
    }
}

/// Queues with variables of its own and applies what is planned.
async fn applied(
    who: &Person,
    configuration: &Configuration,
    variables: Vec<RunVariable>,
) -> anyhow::Result<v1::Run> {
    let request = v1::QueueRunRequest { variables, ..Default::default() };
    let id = who.queue_with("web", configuration, request).await?.run_id;
    who.wait_for_state(&id, RunState::AwaitingConfirmation).await?;
    who.confirm(&id).await?;
    who.wait_for_state(&id, RunState::Applied).await
}

fn output(run: &v1::Run, name: &str) -> String {
    let outputs: Value = serde_json::from_str(&run.outputs_json).unwrap();
    outputs[name]["value"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn terraform_gets_every_value_as_it_was_given() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let strings = odd_strings();
    // Half of them belong to the environment, half to the run.
    let (environment, run) = strings.split_at(strings.len() / 2);
    for (name, value) in environment {
        let scope = Scope::Environment("web".into());
        ada.set_variable(scope, TERRAFORM, name, value, false).await?;
    }
    let mut variables: Vec<_> = run.iter().map(|(name, value)| given(name, value)).collect();
    let object = "{\n  b = { c = <<EOT\nd $${e}\nEOT\n  }\n  a = [1, \"t\\u0077o\", true, null]\n}";
    variables.push(RunVariable { hcl: true, ..given("object", object) });
    let odd = "line one\n$HOME `id` ${x} \"quoted\" größe";
    let environment = VariableCategory::Environment.into();
    variables.push(RunVariable { category: environment, ..given("ODD", odd) });
    let run = applied(ada, &echo(&strings), variables).await?;
    for (name, value) in &strings {
        assert_eq!(output(&run, name), sha256(value), "{name}");
    }
    let json = r#"{"a":[1,"two",true,null],"b":{"c":"d ${e}\n"}}"#;
    assert_eq!(output(&run, "object"), sha256(json));
    let log = ada.log_text(&run.run_id, Phase::Apply).await?;
    assert!(log.contains(&format!("odd is {}", sha256(odd))), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_narrowest_scope_wins_and_personal_values_stay_with_their_person() -> anyhow::Result<()>
{
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let bob = ada.create_user(&stage.plane, "bob", v1::Role::Owner).await?;
    let scopes = [
        (Scope::WholeOrganization(true), "organization"),
        (Scope::Environment("web".into()), "environment"),
        (Scope::Personal(true), "canary-personal"),
    ];
    let names = ["a", "b", "c", "d"];
    for (number, (scope, value)) in scopes.iter().enumerate() {
        for name in &names[number..] {
            ada.set_variable(scope.clone(), TERRAFORM, name, value, false).await?;
        }
    }
    let mut main = String::new();
    for name in names {
        main += &format!("variable \"{name}\" {{\n  type = string\n}}\n");
    }
    main += r#"
resource "terraform_data" "all" {
  input = "${var.a} ${var.b} ${var.c} ${var.d}"
  triggers_replace = timestamp()
  provisioner "local-exec" {
    command = "echo got ${var.a} ${var.b} ${var.c} ${var.d}"
  }
}
"#;
    let configuration = Configuration::of(&[("main.tf", &main)]);
    // Its name would be in a warning of terraform's: this root module does not declare it.
    ada.set_variable(Scope::Personal(true), TERRAFORM, "canary_pager", "x", false).await?;
    let secret = RunVariable { sensitive: true, ..given("d", "canary-run") };
    let mine = applied(ada, &configuration, vec![secret]).await?.run_id;
    let plan = bob.log_text(&mine, Phase::Plan).await?;
    assert!(!plan.contains("canary"), "{plan}");
    // Whoever reads the log learns neither; that they came shows in what bob does not get.
    let log = bob.log_text(&mine, Phase::Apply).await?;
    assert!(log.contains("got organization environment ") && !log.contains("canary"), "{log}");
    let shown = bob.run(&mine).await?;
    assert_eq!(shown.given_variables, ["d"]);
    assert!(!format!("{shown:?}").contains("canary"), "{shown:?}");
    let theirs = applied(&bob, &configuration, vec![given("d", "bobs")]).await?.run_id;
    let log = ada.log_text(&theirs, Phase::Apply).await?;
    assert!(log.contains("got organization environment environment bobs"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_sensitive_value_that_terraform_refuses_is_quoted_masked() -> anyhow::Result<()> {
    let stage = stage().await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let main = r#"
variable "password" {
  type      = string
  sensitive = true
  validation {
    condition     = length(var.password) > 100
    error_message = "It is too short."
  }
}
"#;
    let configuration = Configuration::of(&[("main.tf", main)]);
    let scope = Scope::Environment("web".into());
    ada.set_variable(scope, TERRAFORM, "password", "p%canary$1", true).await?;
    let run = ada.queue("web", &configuration).await?;
    ada.wait_for_state(&run.run_id, RunState::Errored).await?;
    let log = String::from_utf8(ada.read_log(&run.run_id, Phase::Plan).await?)?;
    assert!(log.contains("It is too short.") && log.contains("password = "), "{log}");
    assert!(!log.contains("canary"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_bad_expression_is_refused_at_its_place_when_it_is_saved() -> anyhow::Result<()> {
    let stage = Stage::start(StageOptions { runners: vec![], ..options() }).await?;
    let ada = &stage.owner;
    ada.create_environment("web", MfaPolicy::Never).await?;
    let scope = v1::VariableScope {
        organization: "acme".into(),
        scope: Some(Scope::Environment("web".into())),
    };
    let request = v1::SetVariableRequest {
        scope: Some(scope),
        name: "sizes".into(),
        category: TERRAFORM.into(),
        value: "[\n  1,\n  two,\n]".into(),
        sensitive: false,
        hcl: true,
        ..Default::default()
    };
    let status = ada.variables().set_variable(request).await.unwrap_err();
    assert_eq!(reason(&status), "FIELD_INVALID");
    let metadata = status.get_details_error_info().unwrap().metadata;
    assert_eq!((metadata["line"].as_str(), metadata["column"].as_str()), ("3", "3"));
    Ok(())
}
