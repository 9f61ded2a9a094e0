import com.amazonaws.auth.AWSCredentialsProvider;
import com.amazonaws.auth.DefaultAWSCredentialsProviderChain;
import com.amazonaws.util.VersionInfoUtils;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.List;

/**
 * Resolves credentials through the default provider chain and prints one line of JSON; then again for every line that comes
 * in, by a new chain, or with the argument {@code keep} by the same one.
 */
public class Main {
    public static void main(String[] arguments) throws Exception {
        boolean keep = List.of(arguments).contains("keep");
        var input = new BufferedReader(new InputStreamReader(System.in));
        AWSCredentialsProvider chain = null;
        do {
            if (chain == null || !keep) {
                chain = new DefaultAWSCredentialsProviderChain();
            }
            resolve(chain);
        } while (input.readLine() != null);
        System.exit(0); // a refresh thread may be left
    }

    private static void resolve(AWSCredentialsProvider chain) {
        long began = System.nanoTime();
        String found;
        try {
            found = "\"access_key_id\":\"" + chain.getCredentials().getAWSAccessKeyId() + "\",\"source\":\"default chain\"";
        } catch (RuntimeException e) {
            found = "\"error\":\"" + e.toString().replace("\\", "\\\\").replace("\"", "'").replace("\n", " ") + "\"";
        }
        long ms = (System.nanoTime() - began) / 1_000_000;
        System.out.println("{\"version\":\"aws-java-sdk " + VersionInfoUtils.getVersion() + "\",\"ms\":" + ms + "," + found + "}");
    }
}
