//! A control plane's database for tests of this crate, and accounts in it.

use super::{NewAccount, Principal, Role, accounts::Account, create_account, tokens};
use systemprompt_contract::AccountId;
use systemprompt_postgres::testing::TestCluster;
use systemprompt_workflow::Db;

/// A database with the whole schema, on a cluster of its own; gone when dropped.
pub(crate) struct TestDatabase {
    pub(crate) db: Db,
    _cluster: TestCluster,
}

impl TestDatabase {
    pub(crate) async fn start() -> Self {
        let cluster = TestCluster::start().await;
        let db = Db::connect(&cluster.create_database().await, 16).await.unwrap();
        sqlx::migrate!("../../migrations").run(db.pool()).await.unwrap();
        Self { db, _cluster: cluster }
    }

    pub(crate) async fn account(&self, email: &str, role: Role) -> Account {
        let new = NewAccount { email: email.parse().unwrap(), password: PASSWORD.parse().unwrap(), name: None, role };
        create_account(self.db.pool(), new).await.unwrap()
    }

    /// Somebody who comes with a token of `account`.
    pub(crate) async fn principal(&self, account: AccountId) -> Principal {
        let mut connection = self.db.pool().acquire().await.unwrap();
        let (token, _, _) = tokens::issue_token(&mut connection, account, "test").await.unwrap();
        tokens::authenticate(self.db.pool(), token.expose()).await.unwrap().unwrap()
    }

    /// The one number that a query without parameters answers.
    pub(crate) async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(self.db.pool()).await.unwrap()
    }
}

/// Of every account made here.
pub(crate) const PASSWORD: &str = "correct horse battery";
