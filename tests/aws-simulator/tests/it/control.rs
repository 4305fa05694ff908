//! The control API, as a harness in another process uses it.

use latchkey_aws_simulator::{Facts, account_of};
use serde_json::json;

use crate::support::{ACCOUNT, Client, SERIAL, control, start};

#[tokio::test]
async fn codes_and_counts_are_told() {
    let simulator = start().await;
    let address = simulator.address();
    let (status, told) = control(address, "GET", &format!("code?serial={SERIAL}"), "").await;
    assert_eq!(status, 200);
    let code = simulator.code(SERIAL, 0).unwrap();
    assert_eq!(told["code"], json!(code));
    assert_eq!(told["seconds_until_next"], json!(30));
    let (_, next) = control(address, "GET", &format!("code?serial={SERIAL}&offset=1"), "").await;
    assert_eq!(next["code"], json!(simulator.code(SERIAL, 1).unwrap()));
    Client::of(&simulator).session(&code).await;
    let (_, count) = control(address, "GET", &format!("counts?code={code}"), "").await;
    assert_eq!(count["count"], json!(1));
    let (_, counts) = control(address, "GET", "counts", "").await;
    assert_eq!(counts["by_action"], json!({ "GetSessionToken": 1 }));
    let (_, calls) = control(address, "GET", "calls", "").await;
    assert_eq!(calls[0]["outcome"], json!("accepted"));
    let (_, device) = control(address, "GET", &format!("device?serial={SERIAL}"), "").await;
    assert_eq!(device["attempts_left"], json!(8));
    assert_eq!(control(address, "GET", "code?serial=nobody", "").await.0, 404);
    assert_eq!(control(address, "GET", "nothing", "").await.0, 404);
}

#[tokio::test]
async fn an_unused_code_is_found_until_the_window_is_spent() {
    let simulator = start().await;
    let path = format!("code?serial={SERIAL}&unused=true");
    for _ in 0..5 {
        let (_, told) = control(simulator.address(), "GET", &path, "").await;
        let session = Client::of(&simulator).session(told["code"].as_str().unwrap()).await;
        assert_eq!(session.status, 200);
    }
    assert_eq!(control(simulator.address(), "GET", &path, "").await.0, 404);
}

#[tokio::test]
async fn the_world_can_be_added_to() {
    let simulator = start().await;
    let address = simulator.address();
    let user = json!({ "account": ACCOUNT, "name": "bob" }).to_string();
    assert_eq!(control(address, "POST", "users", &user).await.0, 200);
    assert_eq!(control(address, "POST", "users", &user).await.0, 400, "there is one already");
    let key = json!({ "account": ACCOUNT, "user": "bob" }).to_string();
    let (status, key) = control(address, "POST", "keys", &key).await;
    assert_eq!(status, 200);
    let id = key["id"].as_str().unwrap();
    assert_eq!(account_of(id).as_deref(), Some(ACCOUNT));
    let device = json!({ "account": ACCOUNT, "user": "bob", "serial": "GAHT12345678" }).to_string();
    assert_eq!(control(address, "POST", "devices", &device).await.0, 200);
    let role = json!({ "account": ACCOUNT, "name": "audit", "trust": { "mfa": "demanded" } });
    assert_eq!(control(address, "POST", "roles", &role.to_string()).await.0, 200);
    let bucket = json!({ "name": "more", "allowed_roles": [] }).to_string();
    assert_eq!(control(address, "POST", "buckets", &bucket).await.0, 200);

    let secret = key["secret"].as_str().unwrap().to_owned();
    let bob = Client { key: id.to_owned(), secret, ..Client::of(&simulator) };
    let code = simulator.code("GAHT12345678", 0).unwrap();
    let members = [("SerialNumber", "GAHT12345678"), ("TokenCode", code.as_str())];
    let session = bob.with_session(&bob.sts("GetSessionToken", &members).await);
    assert_eq!(session.assume("arn:aws:iam::123456789012:role/audit").await.status, 200);

    let off = json!({ "id": id, "status": "inactive" }).to_string();
    assert_eq!(control(address, "POST", "key-status", &off).await.0, 200);
    assert_eq!(bob.sts("GetCallerIdentity", &[]).await.text("Code"), "InvalidClientTokenId");
    let gone = control(address, "DELETE", "devices?serial=GAHT12345678", "").await;
    assert_eq!(gone.0, 200);
    assert!(simulator.code("GAHT12345678", 0).is_none());
}

#[tokio::test]
async fn faults_and_time_can_be_scripted() {
    let simulator = start().await;
    let address = simulator.address();
    let faults = r#"[{"effect": "throttle"}, {"action": "AssumeRole", "effect": "reset"}]"#;
    let (status, waiting) = control(address, "POST", "faults", faults).await;
    assert_eq!((status, waiting.as_array().unwrap().len()), (200, 2));
    let user = Client::of(&simulator);
    assert_eq!(user.sts("GetCallerIdentity", &[]).await.text("Code"), "Throttling");
    assert_eq!(simulator.waiting_faults().len(), 1);
    control(address, "DELETE", "faults", "").await;
    assert!(simulator.waiting_faults().is_empty());
    let before = simulator.clock().now();
    control(address, "POST", "clock", r#"{"advance_seconds": 30}"#).await;
    assert_eq!(simulator.clock().now().duration_since(before).as_secs(), 30);
    control(address, "POST", "clock", r#"{"set": "2028-01-01T00:00:00Z"}"#).await;
    assert_eq!(simulator.clock().now().to_string(), "2028-01-01T00:00:00Z");
    let (_, facts) = control(address, "GET", "facts", "").await;
    assert_eq!(serde_json::from_value::<Facts>(facts).unwrap(), simulator.facts());
}
