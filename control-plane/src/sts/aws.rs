//! The exchange over the AWS SDK.
//!
//! Three of the SDK's habits are turned off. Retries: a lost answer would be followed by the
//! same code. The credentials chain: only keys given here may sign, never the control plane's
//! own role. The endpoint variables of the process: the host is the region's STS, or what the
//! operator's configuration names.
//!
//! The SDK's input types print the token code in `Debug`; none is ever kept or formatted here.

use std::error::Error as StdError;
use std::time::Duration;

use aws_sdk_sts::Client;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{BehaviorVersion, Credentials, Region, SharedCredentialsProvider};
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::RequestId;
use latchkey_domain::time::Timestamp;
use secrecy::{ExposeSecret, SecretString};

use super::errors::{Class, classify};
use super::{Exchange, Identity, Refused, SessionCredentials, Sts, Triple};
use crate::store::BoxFuture;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Region of the global partition that the base configuration carries; every call sets its own.
const BASE_REGION: &str = "us-east-1";

#[derive(Debug)]
pub struct AwsSts {
    base: aws_config::SdkConfig,
    /// Names another STS than the region's; from the operator's configuration only.
    endpoint: Option<String>,
}

impl AwsSts {
    /// Prepares connections. `use_fips` picks the FIPS endpoints.
    pub async fn new(endpoint: Option<String>, use_fips: bool) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_timeout(ANSWER_TIMEOUT)
            .build();
        let base = aws_config::defaults(BehaviorVersion::latest())
            .empty_test_environment()
            .no_credentials()
            .region(Region::from_static(BASE_REGION))
            .use_fips(use_fips)
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .load()
            .await;
        Self { base, endpoint }
    }

    fn client(&self, credentials: Credentials, region: &str) -> Client {
        let mut config = aws_sdk_sts::config::Builder::from(&self.base)
            .region(Region::new(region.to_owned()))
            .credentials_provider(SharedCredentialsProvider::new(credentials));
        if let Some(endpoint) = &self.endpoint {
            config = config.endpoint_url(endpoint);
        }
        Client::from_conf(config.build())
    }
}

impl Sts for AwsSts {
    fn exchange<'a>(
        &'a self,
        keys: &'a Triple,
        code: Option<&'a SecretString>,
        region: &'a str,
        duration: Duration,
    ) -> BoxFuture<'a, Exchange> {
        Box::pin(async move {
            let secret = keys.secret_access_key.expose_secret();
            let credentials = Credentials::new(&keys.access_key_id, secret, None, None, "triple");
            let seconds = i32::try_from(duration.as_secs()).unwrap_or(i32::MAX);
            let mut call =
                self.client(credentials, region).get_session_token().duration_seconds(seconds);
            if let Some(code) = code {
                call = call.serial_number(&keys.serial).token_code(code.expose_secret());
            }
            match call.send().await {
                Ok(output) => {
                    let request_id = output.request_id().map(str::to_owned);
                    match output.credentials {
                        Some(issued) => Exchange::Issued {
                            credentials: SessionCredentials {
                                expires_at: Timestamp::from_millis(
                                    issued.expiration.to_millis().unwrap_or(0),
                                ),
                                access_key_id: issued.access_key_id,
                                secret_access_key: issued.secret_access_key.into(),
                                session_token: issued.session_token.into(),
                            },
                            request_id,
                        },
                        None => Exchange::Unknown { request_id },
                    }
                }
                Err(error) => match told(&error) {
                    Told::No(refused) => Exchange::Refused(refused),
                    Told::Nothing { request_id } => Exchange::Unknown { request_id },
                    Told::NeverSent => Exchange::NotReached,
                },
            }
        })
    }

    fn identify<'a>(
        &'a self,
        session: &'a SessionCredentials,
        region: &'a str,
    ) -> BoxFuture<'a, Identity> {
        Box::pin(async move {
            let credentials = Credentials::new(
                &session.access_key_id,
                session.secret_access_key.expose_secret(),
                Some(session.session_token.expose_secret().to_owned()),
                None,
                "session",
            );
            match self.client(credentials, region).get_caller_identity().send().await {
                Ok(output) => output.account.map_or(Identity::Unavailable, Identity::Account),
                Err(error) => match told(&error) {
                    Told::No(Refused { class: Class::Throttled, .. })
                    | Told::Nothing { .. }
                    | Told::NeverSent => Identity::Unavailable,
                    Told::No(refused) => Identity::Refused(refused),
                },
            }
        })
    }
}

/// What an error tells about the request.
enum Told {
    No(Refused),
    Nothing { request_id: Option<String> },
    NeverSent,
}

fn told<E>(error: &SdkError<E>) -> Told
where
    E: ProvideErrorMetadata + StdError + 'static,
    SdkError<E>: RequestId,
{
    let request_id = error.request_id().map(str::to_owned);
    match error {
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            match classify(status, answer.err().code(), answer.err().message()) {
                Some(class) => Told::No(Refused { class, request_id }),
                None => Told::Nothing { request_id },
            }
        }
        SdkError::ConstructionFailure(_) => Told::NeverSent,
        SdkError::DispatchFailure(failure) => {
            let never_connected =
                failure.as_connector_error().is_some_and(|error| never_connected(error));
            if never_connected { Told::NeverSent } else { Told::Nothing { request_id } }
        }
        SdkError::TimeoutError(_) | SdkError::ResponseError(_) => Told::Nothing { request_id },
        // The SDK's enum may grow: what we do not know tells nothing.
        _ => Told::Nothing { request_id },
    }
}

/// Looks for the client's own word that it failed while connecting: only then was nothing sent.
fn never_connected(error: &(dyn StdError + 'static)) -> bool {
    let mut link = Some(error);
    while let Some(error) = link {
        if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
            return error.is_connect();
        }
        link = error.source();
    }
    false
}
